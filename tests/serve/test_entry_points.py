"""The other ways into vLLM: ``AsyncLLM`` and ``vllm bench`` take a ViSpec head like ``LLM``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.server import ENVIRONMENT
from tests.support.child import run_in_subprocess
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.slow]

NUM_DRAFT_TOKENS = 3
NUM_PROMPTS = 4


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return TinyStore(tmp_path_factory.mktemp("tiny")).pair("qwen2_5_vl")


def test_async_llm(pair: tuple[str, str]) -> None:
    model, head = pair
    kwargs = {"model": model, "head": head, "num_draft_tokens": NUM_DRAFT_TOKENS}
    (found,) = run_in_subprocess("tests.serve.entry_points:stream_all", kwargs, timeout=600)
    assert found["found"] == found["plain"]
    assert all(found["found"])
    assert found["accepted"] > 0


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
    assert f"{NUM_DRAFT_TOKENS} draft tokens per round" in done.stdout + done.stderr
