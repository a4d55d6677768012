"""Ten situations from public reports, on a real server whose caches are all too small.

Its KV cache holds a few requests, its encoder cache one large image, its cache of processed images
five small ones. No request may be lost, and every greedy answer is plain vLLM's. Sleeping is
`tests/engine/test_sleep.py`: there is no sleep mode on CPUs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serve.server import started_server
from tests.serve.test_serve import Message, data_url, metric, user
from tests.support.drafts import tree
from tests.support.tiny_models import random_image
from tests.support.tiny_store import TinyStore
from vllm_vispec.bench.server import BenchServer, call

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

NAME, MAX_TOKENS = "tiny", 20
OPTIONS: Mapping[str, str] = {
    "--served-model-name": NAME,
    "--dtype": "float32",
    "--max-model-len": "256",
    "--max-num-seqs": "12",
    "--block-size": "32",
    "--num-gpu-blocks-override": "14",
    # As many tokens as the largest image has: the encoder cache holds no second one.
    "--max-num-batched-tokens": "64",
    "--mm-processor-cache-gb": "0.001",
    "--tool-call-parser": "hermes",
    "--structured-outputs-config": json.dumps({"backend": "xgrammar"}),
}
TREE = tree()
DRAFTS = {
    "chain": {"num_speculative_tokens": 4},
    "tree": {"num_speculative_tokens": TREE["num_draft_tokens"], "tree": TREE["tree"]},
}
ANSWER = {
    "type": "object",
    "properties": {"star": {"enum": ["red", "blue"]}},
    "required": ["star"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "report", "parameters": ANSWER}}


def image(seed: int, width: int = 84, height: int = 84) -> str:
    buffer = BytesIO()
    random_image(seed, (width, height)).save(buffer, format="PNG")
    return data_url(buffer.getvalue())


LARGE = [image(seed, 224, 224) for seed in range(4)]
SMALL = [image(seed) for seed in range(12)]
Chat = tuple[list[Message], dict[str, Any]]


def greedy(messages: list[Message], **changes: Any) -> Chat:
    return messages, changes


MANY = [
    greedy(user(f"What is {number} here?", *([SMALL[number % 12]] if number % 3 else [])))
    for number in range(128)
]
SCHEMA = {"extra_body": {"structured_outputs": {"json": ANSWER}}}
CALL = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "report"}}}
GRAMMARS = [
    greedy(user(f"Report star {number}.", SMALL[number % 5]), **(SCHEMA if number % 2 else CALL))
    for number in range(30)
]
# More images than the cache of processed ones holds, each coming back after it was dropped.
DRIFT = [greedy(user("And this?", SMALL[number % 9])) for number in range(36)]
ONE_AT_A_TIME = [greedy(user(f"Large {number}?", LARGE[number % 4])) for number in range(8)]
SIZES = ((1, 1), (1, 120), (120, 1), (28, 28), (600, 28), (30, 500), (27, 29), (1, 4000))
EXTREME = [greedy(user("How large?", image(7, *size))) for size in SIZES]
TOUCHING = [
    greedy(user("Both?", SMALL[0], SMALL[1])),
    greedy(user("Twice?", SMALL[0], SMALL[0], SMALL[2])),
    greedy(user("Order?", SMALL[1], LARGE[0])),
]
SITUATIONS: Mapping[str, Sequence[Chat]] = {
    "128 requests at once": MANY,
    "grammars": GRAMMARS,
    "image cache drift": DRIFT,
    "encoder cache of one image": ONE_AT_A_TIME,
    "extreme images": EXTREME,
    "touching images": TOUCHING,
}


@contextmanager
def server(target: Path, log: Path, speculative: Mapping[str, Any] | None) -> Iterator[BenchServer]:
    arguments = [str(target), "--enforce-eager", "--enable-auto-tool-choice"]
    for option in OPTIONS.items():
        arguments += option
    if speculative is not None:
        arguments += ["--speculative-config", json.dumps(speculative)]
    with started_server(arguments, log, {"VLLM_SERVER_DEV_MODE": "1"}) as started:
        started.wait_until_ready(600)
        yield started


def ask(client: openai.OpenAI, chat: Chat) -> str:
    """Return the answer, or the number of the error."""
    messages, changes = chat
    try:
        answer = client.chat.completions.create(
            model=NAME, messages=messages, temperature=0.0, max_tokens=MAX_TOKENS, **changes
        )
    except openai.APIStatusError as error:
        return f"status {error.status_code}: {error.message}"
    message = answer.choices[0].message
    calls = [one.function.arguments for one in message.tool_calls or ()]
    return f"{message.content or ''}{calls or ''}"


def ask_at_once(client: openai.OpenAI, chats: Sequence[Chat]) -> list[str]:
    with ThreadPoolExecutor(max_workers=len(chats)) as clients:
        return list(clients.map(lambda chat: ask(client, chat), chats))


@contextmanager
def client_of(started: BenchServer) -> Iterator[openai.OpenAI]:
    url = f"{started.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", timeout=600, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def plain(tiny: TinyStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What plain vLLM answers, with the same settings."""
    log = tmp_path_factory.mktemp("plain") / "serve.log"
    with server(tiny.target(), log, None) as started, client_of(started) as client:
        return {name: ask_at_once(client, chats) for name, chats in SITUATIONS.items()}


@pytest.fixture(scope="module", params=DRAFTS)
def drafting(
    request: pytest.FixtureRequest,
    plain: dict[str, list[str]],
    tiny: TinyStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[BenchServer]:
    """A server with a draft; it starts when plain vLLM's is gone."""
    speculative = {"method": "vispec", "model": tiny.head(), **DRAFTS[request.param]}
    log = tmp_path_factory.mktemp(request.param) / "serve.log"
    with server(tiny.target(), log, speculative) as started:
        yield started


@pytest.fixture(scope="module")
def client(drafting: BenchServer) -> Iterator[openai.OpenAI]:
    with client_of(drafting) as connected:
        yield connected


def preemptions(started: BenchServer) -> float:
    return sum(sample.value for sample in metric(started, "vllm:num_preemptions_total"))


@pytest.mark.parametrize("name", SITUATIONS)
def test_nothing_is_lost_and_answers_are_plain_vllms(
    client: openai.OpenAI, drafting: BenchServer, plain: dict[str, list[str]], name: str
) -> None:
    before = preemptions(drafting)
    found = ask_at_once(client, SITUATIONS[name])
    assert found == plain[name]
    refused = [one for one in found if one.startswith("status")]
    assert len(refused) == (1 if name == "extreme images" else 0), refused
    # Images that are first seen while requests push each other out are among the 128.
    assert preemptions(drafting) > before or len(found) < 128


def test_aborts(client: openai.OpenAI, plain: dict[str, list[str]]) -> None:
    """Clients that leave after a few tokens, amid others that stay."""

    def leave(chat: Chat) -> None:
        messages, _ = chat
        stream = client.chat.completions.create(
            model=NAME, messages=messages, temperature=0.0, max_tokens=MAX_TOKENS, stream=True
        )
        next(iter(stream))
        stream.close()

    with ThreadPoolExecutor(max_workers=24) as clients:
        left = [clients.submit(leave, chat) for chat in MANY[:24:2]]
        stayed = [clients.submit(ask, client, chat) for chat in MANY[1:24:2]]
        assert [one.result() for one in stayed] == plain["128 requests at once"][1:24:2]
        for one in left:
            one.result()


def test_resets_of_caches(
    client: openai.OpenAI, drafting: BenchServer, plain: dict[str, list[str]]
) -> None:
    """The prefix cache amid requests; those of images between them, as two processes hold each.

    Amid requests plain vLLM answers some with 500, too: it warns that the two may then differ.
    """
    expected = plain["image cache drift"][:12]
    for _ in range(2):
        with ThreadPoolExecutor(max_workers=12) as clients:
            found = clients.map(lambda chat: ask(client, chat), DRIFT[:12])
            call(f"{drafting.url}/reset_prefix_cache", b"")
            assert list(found) == expected
        drafting.reset_caches()
