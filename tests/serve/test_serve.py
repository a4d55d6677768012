"""`vllm serve` with a ViSpec head, driven by the real OpenAI client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.serve import chats
from tests.serve.server import Server, served_folder, started_server
from tests.support.engine import Engine
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.serve, pytest.mark.engine]

SERVED_NAME = "tiny-vispec"
NUM_DRAFT_TOKENS = 4
MAX_IMAGE_PIXELS = 1_000_000
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
ACCEPTED_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
CHATS = chats.chats()


def _arguments(model: str, head: str) -> list[str]:
    config = {"method": "vispec", "model": head, "num_speculative_tokens": NUM_DRAFT_TOKENS}
    options = {
        "--served-model-name": SERVED_NAME,
        "--speculative-config": json.dumps(config),
        "--dtype": "float32",
        "--max-model-len": str(chats.MAX_MODEL_LEN),
        "--max-num-batched-tokens": "256",
        "--max-num-seqs": "8",
        "--limit-mm-per-prompt": json.dumps({"image": 2}),
    }
    return [model, "--enforce-eager", *(part for pair in options.items() for part in pair)]


@pytest.fixture(scope="module")
def pair(tiny: TinyStore) -> tuple[str, str]:
    return str(tiny.target()), tiny.head()


@pytest.fixture(scope="module")
def starting(pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log_file = tmp_path_factory.mktemp("serve") / "serve.log"
    env = {"VLLM_MAX_IMAGE_PIXELS": str(MAX_IMAGE_PIXELS)}
    with started_server(_arguments(*pair), log_file, env) as started:
        yield started


@pytest.fixture(scope="module")
def plain(engine: Callable[..., Engine], starting: Server) -> dict[str, str]:
    """Answers of the target without speculation, found while the server starts."""
    return dict(engine("v1", max_model_len=chats.MAX_MODEL_LEN).run(chats.plain_answers))


@pytest.fixture(scope="module")
def server(starting: Server, plain: dict[str, str]) -> Server:
    starting.wait_until_ready(600)
    return starting


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0
    ) as connected:
        yield connected


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a folder with an image and with a file that is none."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "picture.png").write_bytes(chats.picture(1))
    (folder / "broken.png").write_bytes(b"this is no image")
    with served_folder(folder) as address:
        yield address


def ask(client: openai.OpenAI, messages: list[dict[str, Any]]) -> str:
    """Return the whole answer."""
    answer = client.chat.completions.create(**_request(messages))
    return answer.choices[0].message.content or ""


def ask_streaming(client: openai.OpenAI, messages: list[dict[str, Any]]) -> str:
    """Return the answer put together from its parts."""
    stream = client.chat.completions.create(**_request(messages), stream=True)
    return "".join(part.choices[0].delta.content or "" for part in stream if part.choices)


def _request(messages: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": SERVED_NAME,
        "messages": messages,
        "temperature": 0.0,
        "max_tokens": chats.MAX_TOKENS,
        "extra_body": {"ignore_eos": True},
    }


@pytest.mark.parametrize("name", CHATS)
def test_answers_equal_plain_vllm(client: openai.OpenAI, plain: dict[str, str], name: str) -> None:
    assert ask(client, CHATS[name]) == plain[name]
    assert ask_streaming(client, CHATS[name]) == plain[name]


def test_image_from_url(client: openai.OpenAI, plain: dict[str, str], files: str) -> None:
    messages = chats.user("What does the picture show?", f"{files}/picture.png")
    assert ask(client, messages) == plain["one image"]
    assert ask_streaming(client, messages) == plain["one image"]


def test_clients_at_once(client: openai.OpenAI, plain: dict[str, str]) -> None:
    names = [*CHATS] * 3
    with ThreadPoolExecutor(max_workers=6) as clients:
        ways = [ask if number % 2 else ask_streaming for number in range(len(names))]
        answers = [
            clients.submit(way, client, CHATS[name]) for way, name in zip(ways, names, strict=True)
        ]
        found = [answer.result(timeout=300) for answer in answers]
    assert found == [plain[name] for name in names]


def test_metrics(client: openai.OpenAI, server: Server) -> None:
    before = sum(server.metric(ACCEPTED).values())
    ask(client, CHATS["one image"])
    after = sum(server.metric(ACCEPTED).values())
    assert after > before
    by_position = {
        dict(labels)["position"]: value
        for labels, value in server.metric(ACCEPTED_PER_POSITION).items()
    }
    assert sorted(by_position) == [str(position) for position in range(NUM_DRAFT_TOKENS)]
    assert sum(by_position.values()) == after
    assert by_position["0"] >= by_position["1"] > 0


LONG = "word " * chats.MAX_MODEL_LEN
TRUNCATED = chats.picture(1)[:100]
BAD_REQUESTS: dict[str, list[dict[str, Any]]] = {
    "no base64": chats.user("?", "data:image/png;base64,@@@@"),
    "no image": chats.user("?", chats.data_url(b"this is no image")),
    "truncated image": chats.user("?", chats.data_url(TRUNCATED)),
    "huge image": chats.user("?", chats.data_url(chats.huge_png(4000, 4000))),
    "too many images": chats.user("?", *[chats.data_url(chats.picture(i)) for i in range(3)]),
    "too long": chats.user(LONG),
    "too long with image": chats.user(LONG, chats.data_url(chats.picture(1))),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_request(client: openai.OpenAI, plain: dict[str, str], name: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, BAD_REQUESTS[name])
    assert 400 <= caught.value.status_code < 500, caught.value
    assert ask(client, CHATS["one image"]) == plain["one image"]


def test_decompression_bomb(client: openai.OpenAI, plain: dict[str, str]) -> None:
    """Pillow's own limit stops it, which vLLM 0.32 reports as 500 before it closes the connection.

    The server goes on.
    """
    bomb = chats.user("?", chats.data_url(chats.huge_png(60000, 60000)))
    with pytest.raises((openai.APIStatusError, openai.APIConnectionError)):
        ask(client, bomb)
    # The client may still hold the connection that the server is about to close.
    patient = client.with_options(max_retries=3)
    assert ask(patient, CHATS["one image"]) == plain["one image"]


def test_unknown_model(client: openai.OpenAI, plain: dict[str, str]) -> None:
    request = _request(CHATS["text only"]) | {"model": "no-such-model"}
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**request)
    assert ask(client, CHATS["text only"]) == plain["text only"]


@pytest.mark.parametrize("file", ["broken.png", "missing.png"])
def test_bad_url(client: openai.OpenAI, plain: dict[str, str], files: str, file: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, chats.user("?", f"{files}/{file}"))
    assert 400 <= caught.value.status_code < 500, caught.value
    assert ask(client, CHATS["one image"]) == plain["one image"]
