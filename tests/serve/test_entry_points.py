"""The other ways into vLLM: ``AsyncLLM`` and ``vllm bench`` take a ViSpec head like ``LLM``."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.serve import chats
from tests.serve.server import ENVIRONMENT
from tests.support.child import Child
from tests.support.engine import (
    Completion,
    EngineOptions,
    completions,
    greedy,
    register_plugin,
    shut_down_distributed,
)
from tests.support.runners import V1_ENV
from tests.support.tiny_families import FAMILIES
from tests.support.tiny_models import random_image
from tests.support.tiny_store import KIND, TinyStore

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.slow]

NUM_DRAFT_TOKENS = 3
NUM_PROMPTS = 4


@pytest.fixture(scope="module")
def pair(tiny: TinyStore) -> tuple[str, str]:
    return str(tiny.target()), tiny.head()


def test_async_llm(pair: tuple[str, str]) -> None:
    model, head = pair
    options = EngineOptions(model, draft=head, num_draft_tokens=NUM_DRAFT_TOKENS)
    child = Child(V1_ENV)
    plain = child.call(_stream_all, EngineOptions(model))
    found = child.call(_stream_all, options)
    child.close()
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    assert all(one.token_ids for one in found)
    assert sum(sum(one.per_step_accepted) for one in found) > 0


def test_vllm_bench(pair: tuple[str, str], tmp_path: Path) -> None:
    model, head = pair
    config = {"method": "vispec", "model": head, "num_speculative_tokens": NUM_DRAFT_TOKENS}
    options = {
        "--model": model,
        "--speculative-config": json.dumps(config),
        "--dtype": "float32",
        "--max-model-len": "256",
        "--max-num-seqs": "4",
        "--dataset-name": "random",
        "--random-input-len": "16",
        "--random-output-len": "16",
        "--num-prompts": str(NUM_PROMPTS),
        "--output-json": str(tmp_path / "bench.json"),
    }
    command = [str(Path(sys.executable).with_name("vllm")), "bench", "throughput"]
    command += ["--enforce-eager", *(part for pair in options.items() for part in pair)]
    done = subprocess.run(
        command,
        env=os.environ | ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "INFO"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "bench.json").read_text())["num_requests"] == NUM_PROMPTS
    assert f"ViSpec drafts chains of {NUM_DRAFT_TOKENS} tokens" in done.stdout + done.stderr


# What follows runs in the child.


def _stream_all(options: EngineOptions) -> list[Completion]:
    """Stream the answers to requests with and without an image from an ``AsyncLLM`` at once."""
    register_plugin()
    answers = asyncio.run(_answers(options))
    shut_down_distributed()
    return answers


async def _answers(options: EngineOptions) -> list[Completion]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    running = AsyncLLM.from_engine_args(AsyncEngineArgs(**options.llm_kwargs()))
    try:
        return await asyncio.gather(
            *(_answer(running, name, prompt) for name, prompt in _prompts().items())
        )
    finally:
        running.shutdown()


async def _answer(running: Any, name: str, prompt: Any) -> Completion:
    params = greedy(chats.MAX_TOKENS)
    outputs = [output async for output in running.generate(prompt, params, request_id=name)]
    # Each output of a stream holds all tokens so far.
    return completions(outputs[-1])[0]


def _prompts() -> dict[str, Any]:
    text = f"{FAMILIES[KIND].image_prompt} What is it?"
    with_image = {"prompt": text, "multi_modal_data": {"image": random_image(1)}}
    return {"text": {"prompt": "Please count to ten."}, "image": with_image}
