"""`vispec regenerate --server` against `vllm serve`: the answers of the offline engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.pair import DEFAULT_MODEL
from examples.tiny_vlm.families import FAMILIES
from examples.tiny_vlm.questions import write_questions
from tests.serve.server import started_server
from tests.support.engine import IN_PROCESS_ENV

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

SAMPLES = 9
LIMITS = ("--dtype", "float32", "--max-model-len", "512")


def regenerate(questions: Path, output: Path, *more: str) -> dict[str, Any]:
    """Run the command; returns its records by id."""
    command = ["regenerate", "--target", DEFAULT_MODEL, "--input", str(questions)]
    options = ["--output", str(output), "--temperature", "0", "--prompt-style", "none"]
    done = subprocess.run(
        [sys.executable, "-m", "vllm_vispec", *command, *options, "--max-tokens", "48", *more],
        env=os.environ | IN_PROCESS_ENV,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{SAMPLES} samples: {SAMPLES} regenerated" in done.stdout
    return {record["id"]: record for record in map(json.loads, output.read_text().splitlines())}


def test_server_and_engine_write_the_same_answers(tmp_path: Path) -> None:
    questions = write_questions(tmp_path, "heldout", 650_000, SAMPLES, tuple(FAMILIES))
    arguments = [DEFAULT_MODEL, *LIMITS, "--enforce-eager", "--max-num-seqs", "4"]
    with started_server(arguments, tmp_path / "serve.log", {}) as server:
        server.wait_until_ready(300)
        url = ("--server", f"{server.url}/v1", "--concurrency", "3")
        served = regenerate(questions, tmp_path / "served.jsonl", *url)
    eager = ("--engine", '{"enforce_eager": true}')
    offline = regenerate(questions, tmp_path / "offline.jsonl", *LIMITS, *eager)
    assert set(served) == set(offline)
    for name, record in offline.items():
        assert served[name]["messages"] == record["messages"], name
        assert served[name]["response_token_ids"] == record["response_token_ids"], name
        assert served[name]["round_trip"] is True
