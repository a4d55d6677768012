"""`vllm serve` with a ViSpec head, driven by the real OpenAI client."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import os
import re
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.server import ENVIRONMENT, started_server
from tests.support.child import REPOSITORY
from tests.support.engine import StartEngine, greedy
from tests.support.tiny_models import random_image
from tests.support.tiny_store import TinyStore
from vllm_vispec.bench.server import CLI, HOST, BenchServer, call

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = [pytest.mark.serve, pytest.mark.engine]

SERVED_NAME = "tiny-vispec"
NUM_DRAFT_TOKENS = 4
MAX_TOKENS, MAX_MODEL_LEN = 24, 512
DRAFTS = "vllm:spec_decode_num_drafts_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
ACCEPTED_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
Message = dict[str, Any]


def picture(seed: int) -> bytes:
    """Return a small random PNG."""
    buffer = io.BytesIO()
    random_image(seed).save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(content: bytes) -> str:
    """Return bytes as the ``data:`` URL of a PNG."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def user(text: str, *urls: str) -> list[Message]:
    """Return a chat of one turn with images."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def huge_png(width: int, height: int) -> bytes:
    """Return a PNG that claims to be of this size; its pixels are missing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1024))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


FIRST, SECOND = data_url(picture(1)), data_url(picture(2))
CHATS = {
    "one image": user("What does the picture show?", FIRST),
    "same image": user("How many stars are there?", FIRST),
    "other image": user("What does the picture show?", SECOND),
    "two images": user("Compare both pictures.", FIRST, SECOND),
    "text only": user("Please answer with a JSON object."),
}


@pytest.fixture(scope="module")
def starting(tiny: TinyStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BenchServer]:
    config = {"method": "vispec", "model": tiny.head(), "num_speculative_tokens": NUM_DRAFT_TOKENS}
    # Times would decide how many tokens are drafted.
    config["adaptive"] = False
    options = {
        "--served-model-name": SERVED_NAME,
        "--speculative-config": json.dumps(config),
        "--dtype": "float32",
        "--max-model-len": str(MAX_MODEL_LEN),
        "--max-num-batched-tokens": "256",
        "--max-num-seqs": "8",
        "--limit-mm-per-prompt": json.dumps({"image": 2}),
    }
    arguments = [str(tiny.target()), "--enforce-eager"]
    for option in options.items():
        arguments += option
    log_file = tmp_path_factory.mktemp("serve") / "serve.log"
    with started_server(arguments, log_file, {"VLLM_MAX_IMAGE_PIXELS": "1000000"}) as server:
        yield server


@pytest.fixture(scope="module")
def plain(engine: StartEngine, starting: BenchServer) -> dict[str, str]:
    """Answers of the target without speculation, found while the server starts."""
    return dict(engine("v1", max_model_len=MAX_MODEL_LEN).run(plain_answers))


def plain_answers(llm: LLM) -> dict[str, str]:
    """Answer all chats (in the engine's process)."""
    outputs = llm.chat(list(CHATS.values()), greedy(MAX_TOKENS), use_tqdm=False)
    return {name: output.outputs[0].text for name, output in zip(CHATS, outputs, strict=True)}


@pytest.fixture(scope="module")
def client(starting: BenchServer, plain: dict[str, str]) -> Iterator[openai.OpenAI]:
    starting.wait_until_ready(600)
    url = f"{starting.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", timeout=120, max_retries=0) as connected:
        yield connected


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a folder with an image and with a file that is none."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "picture.png").write_bytes(picture(1))
    (folder / "broken.png").write_bytes(b"this is no image")
    handler = functools.partial(_QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer((HOST, 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://{HOST}:{httpd.server_address[1]}"
        httpd.shutdown()


def _request(messages: list[Message]) -> dict[str, Any]:
    return {
        "model": SERVED_NAME,
        "messages": messages,
        "temperature": 0.0,
        "max_tokens": MAX_TOKENS,
        "extra_body": {"ignore_eos": True},
    }


def ask(client: openai.OpenAI, messages: list[Message]) -> str:
    """Return the whole answer."""
    answer = client.chat.completions.create(**_request(messages))
    return answer.choices[0].message.content or ""


def ask_streaming(client: openai.OpenAI, messages: list[Message]) -> str:
    """Return the answer put together from its parts."""
    stream = client.chat.completions.create(**_request(messages), stream=True)
    return "".join(part.choices[0].delta.content or "" for part in stream if part.choices)


@pytest.mark.parametrize("name", CHATS)
def test_answers_equal_plain_vllm(client: openai.OpenAI, plain: dict[str, str], name: str) -> None:
    assert ask(client, CHATS[name]) == plain[name]
    assert ask_streaming(client, CHATS[name]) == plain[name]


def test_image_from_url(client: openai.OpenAI, plain: dict[str, str], files: str) -> None:
    messages = user("What does the picture show?", f"{files}/picture.png")
    assert ask(client, messages) == plain["one image"]


def test_clients_at_once(client: openai.OpenAI, plain: dict[str, str]) -> None:
    names = [*CHATS] * 3
    with ThreadPoolExecutor(max_workers=6) as clients:
        answers = [
            clients.submit(ask if number % 2 else ask_streaming, client, CHATS[name])
            for number, name in enumerate(names)
        ]
        found = [answer.result(timeout=300) for answer in answers]
    assert found == [plain[name] for name in names]


def metric(server: BenchServer, name: str) -> list[Any]:
    """Return the samples of a counter or gauge."""
    families = text_string_to_metric_families(call(f"{server.url}/metrics"))
    return [one for family in families for one in family.samples if one.name == name]


def test_metrics(client: openai.OpenAI, starting: BenchServer) -> None:
    before = sum(sample.value for sample in metric(starting, ACCEPTED))
    ask(client, CHATS["one image"])
    after = sum(sample.value for sample in metric(starting, ACCEPTED))
    assert after > before
    by_position = {
        sample.labels["position"]: sample.value
        for sample in metric(starting, ACCEPTED_PER_POSITION)
    }
    assert sorted(by_position) == [str(position) for position in range(NUM_DRAFT_TOKENS)]
    assert sum(by_position.values()) == after
    assert by_position["0"] >= by_position["1"] > 0


def limited(given: str) -> dict[str, Any]:
    """Return a request that says how many draft tokens it wants."""
    request = _request(CHATS["one image"])
    return request | {"extra_body": {"ignore_eos": True, "vllm_xargs": {"vispec": given}}}


def test_a_request_without_drafts(
    client: openai.OpenAI, starting: BenchServer, plain: dict[str, str]
) -> None:
    before = sum(sample.value for sample in metric(starting, DRAFTS))
    answer = client.chat.completions.create(**limited('{"num_speculative_tokens": 0}'))
    assert answer.choices[0].message.content == plain["one image"]
    assert sum(sample.value for sample in metric(starting, DRAFTS)) == before


def test_a_wrong_number_of_draft_tokens_is_answered_with_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="=5 must be at most 4, which is what"):
        client.chat.completions.create(**limited('{"num_speculative_tokens": 5}'))


LONG = "word " * MAX_MODEL_LEN
BAD_REQUESTS: dict[str, list[Message]] = {
    "no base64": user("?", "data:image/png;base64,@@@@"),
    "no image": user("?", data_url(b"this is no image")),
    "truncated image": user("?", data_url(picture(1)[:100])),
    "huge image": user("?", data_url(huge_png(4000, 4000))),
    "too many images": user("?", *[data_url(picture(i)) for i in range(3)]),
    "too long": user(LONG),
    "too long with image": user(LONG, FIRST),
    "broken file": user("?", "FILES/broken.png"),
    "missing file": user("?", "FILES/missing.png"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request(client: openai.OpenAI, plain: dict[str, str], files: str, name: str) -> None:
    messages = json.loads(json.dumps(BAD_REQUESTS[name]).replace("FILES", files))
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, messages)
    assert 400 <= caught.value.status_code < 500, caught.value
    assert ask(client, CHATS["one image"]) == plain["one image"]


def test_decompression_bomb(client: openai.OpenAI, plain: dict[str, str]) -> None:
    """Pillow's own limit stops it, which vLLM 0.32 reports as 500 before it closes the connection.

    The server goes on.
    """
    with pytest.raises((openai.APIStatusError, openai.APIConnectionError)):
        ask(client, user("?", data_url(huge_png(60000, 60000))))
    # The client may still hold the connection that the server is about to close.
    patient = client.with_options(max_retries=3)
    assert ask(patient, CHATS["one image"]) == plain["one image"]


def run_vllm(*arguments: str) -> str:
    """Return what a command of vLLM's prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, *CLI, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)},
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_commands_of_vllm(
    client: openai.OpenAI, starting: BenchServer, tiny: TinyStore, plain: dict[str, str]
) -> None:
    """``vllm chat`` and ``vllm bench serve`` ask a server that drafts; the latter counts drafts."""
    assert run_vllm("chat", "--url", f"{starting.url}/v1", "--quick", "Say something.").strip()
    asked = ("--dataset-name", "random-mm", "--num-prompts", "4", "--max-concurrency", "2")
    images = ("--random-mm-base-items-per-request", "1", "--random-mm-num-mm-items-range-ratio")
    sizes = ("--random-mm-bucket-config", "{(64, 64, 1): 1.0}", "--random-input-len", "8")
    printed = run_vllm(
        *("bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
        *("--base-url", starting.url, "--model", str(tiny.target())),
        *("--served-model-name", SERVED_NAME, *asked, *images, "0", *sizes),
        *("--random-output-len", "8", "--ignore-eos", "--num-warmups", "0"),
    )
    assert "Successful requests:                     4" in printed
    assert re.search(r"Acceptance length:\s+[1-5]\.", printed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_run_batch(tiny: TinyStore, plain: dict[str, str], tmp_path: Path) -> None:
    """``vllm run-batch`` with a head answers as plain vLLM does."""
    settings = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    model, asked, answered = str(tiny.target()), tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    lines = [
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": model, "messages": CHATS[name], **settings},
        }
        for name in plain
    ]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"method": "vispec", "model": tiny.head(), "num_speculative_tokens": NUM_DRAFT_TOKENS}
    run_vllm(
        *("run-batch", "-i", str(asked), "-o", str(answered), "--model", model),
        *("--speculative-config", json.dumps(config), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", str(MAX_MODEL_LEN)),
    )
    answers = map(json.loads, answered.read_text().splitlines())
    assert plain == {
        one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"]
        for one in answers
    }


MOST_LINES_OF_VLLM = 20
"""What vLLM prints before it reads the speculative config: banner, arguments, the model."""


@pytest.mark.timeout(300)
def test_a_refused_setting_is_one_line(tiny: TinyStore) -> None:
    """Behind what vLLM logs, without a traceback."""
    config = {"method": "vispec", "model": tiny.head(), "num_speculative_token": 4}
    command = [sys.executable, *CLI, "serve", str(tiny.target())]
    done = subprocess.run(
        [*command, "--speculative-config", json.dumps(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)},
        timeout=240,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stdout
    assert lines[-1] == (
        'vllm-vispec: speculative config: key "num_speculative_token" is unknown; '
        'did you mean "num_speculative_tokens"?'
    )
    assert len(lines) <= MOST_LINES_OF_VLLM, done.stdout
    assert not [line for line in lines if "Traceback" in line or "ERROR" in line]
