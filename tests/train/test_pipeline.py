"""From questions to a served head, with the commands a user types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.tiny_vlm.families import FAMILIES
from examples.tiny_vlm.questions import write_questions
from examples.tiny_vlm.shipped import HEAD, TARGET
from tests.serve.server import started_server
from tests.support.engine import IN_PROCESS_ENV, StartEngine
from tests.support.tiny_store import TinyStore
from vllm_vispec.heads.folder import inspect_head

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1500)]

NUM_DRAFT_TOKENS = 3
PROMPTS = ("the cat sees a red ball", "two blue boxes near trees")
SETTINGS = {
    "target.dtype": "float32",
    "data.max_length": "256",
    "data.validation_share": "0.2",
    "head.dtype": "float32",
    "optimizer.lr": "0.003",
    "schedule.epochs": "0",
    "schedule.max_steps": "20",
    "batch.size": "4",
    "run.device": "cpu",
    "run.validate_every": "10",
    "run.num_draft_tokens": str(NUM_DRAFT_TOKENS),
}
EAGER = ("--engine", '{"enforce_eager": true}')


def vispec(*arguments: str | Path) -> str:
    """Run a command; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm_vispec", *map(str, arguments)],
        env=os.environ | IN_PROCESS_ENV,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def regenerate(target: str | Path, questions: Path, output: Path, *more: str) -> dict[str, Any]:
    """Let the target answer greedily; returns the records by id."""
    files = ("--target", target, "--input", questions, "--output", output)
    vispec("regenerate", *files, "--temperature", "0", "--prompt-style", "none", *more)
    return {record["id"]: record for record in map(json.loads, output.read_text().splitlines())}


def evaluate(target: str | Path, head: str | Path, data: Path, depth: int) -> dict[str, Any]:
    """Simulate and measure; returns the report."""
    output, files = data.with_suffix(".eval.json"), ("--target", target, "--head", head)
    exactly = ("--engine", "--check-greedy", "--dtype", "float32")
    more = (*exactly, "-k", str(depth), "--output", output)
    vispec("eval", *files, "--data", data, *more)
    report: dict[str, Any] = json.loads(output.read_text())
    return report


def test_regenerate_train_evaluate_export_serve(
    engine: StartEngine, tiny: TinyStore, dialogues: Path, tmp_path: Path
) -> None:
    target, answers = str(tiny.target("qwen2_5_vl")), tmp_path / "answers.jsonl"
    limits = ("--max-tokens", "24", "--dtype", "float32", "--max-model-len", "256")
    # Training and evaluation take the sizes of images from the answers.
    sizes = ("--max-pixels", str(6 * 28 * 28))
    written = regenerate(target, dialogues, answers, *limits, *sizes, *EAGER)
    assert len(written) == len(dialogues.read_text().splitlines())
    paths = {"target.model": target, "data.train": str(answers)}
    # One setting more, and the head has SpecVLM's compressor.
    for name, more in (("query", {}), ("select", {"compressor": "select"})):
        settings = SETTINGS | paths | more | {"run.output": str(tmp_path / name)}
        words = [word for item in settings.items() for word in ("--set", "=".join(item))]
        vispec("train", *words)
        head = tmp_path / name / "head"
        assert inspect_head(head).config.compressor_spec.name == name
        # A head that is served by its own folder finds its target, and answers as that does.
        plain = engine("v1", model=target)
        detailed = {"per_request_spec_decode_metrics": "detailed"}
        served = engine("v1", model=str(head), **detailed)
        answered = [[x.token_ids for x in one.generate(PROMPTS, 24)] for one in (plain, served)]
        assert answered[0] == answered[1]
        assert (plain.drafts(), served.drafts() > 0) == (0, True)
    report = evaluate(target, tmp_path / "query" / "head", answers, NUM_DRAFT_TOKENS)
    assert "acceptance_length" in json.dumps(report)
    assert report["max_pixels"] == 6 * 28 * 28
    answers_found = report["simulated"]["overall"]["answers"]
    assert report["engine"]["answers_identical_to_data"] >= 0.8 * answers_found


def test_the_shipped_pair(tmp_path: Path) -> None:
    """A server answers like the engine, and the simulation of these answers is the engine's."""
    count, data = 2 * len(FAMILIES), tmp_path / "offline.jsonl"
    questions = write_questions(tmp_path, "heldout", 650_000, count, tuple(FAMILIES))
    limits = ("--dtype", "float32", "--max-model-len", "1024")
    tokens = ("--max-tokens", "160")
    offline = regenerate(TARGET, questions, data, *tokens, *limits, *EAGER)
    arguments = [TARGET, *limits, "--enforce-eager", "--max-num-seqs", "4"]
    with started_server(arguments, tmp_path / "serve.log", {}) as server:
        server.wait_until_ready(300)
        url = ("--server", f"{server.url}/v1", "--concurrency", "3")
        served = regenerate(TARGET, questions, tmp_path / "served.jsonl", *tokens, *url)
    assert set(served) == set(offline)
    for name, record in offline.items():
        assert served[name]["messages"] == record["messages"], name
        assert served[name]["response_token_ids"] == record["response_token_ids"], name
        assert served[name]["round_trip"] is True
    report = evaluate(TARGET, HEAD, data, 5)
    simulated, measured = report["simulated"], report["engine"]["families"]
    assert report["rejected"] == []
    assert report["greedy_share"] == 1.0
    assert set(simulated) == set(measured)
    assert simulated["overall"]["steps"] > 100
    # Both compute in float32 and differ by rounding only, which can turn a draft token whose two
    # best logits are all but equal; one such token moves the steps behind it by a few.
    for family, one in simulated.items():
        assert one["answers"] == measured[family]["answers"]
        assert one["tokens"] == measured[family]["tokens"]
    gap = simulated["overall"]["mean_accepted_tokens"] - measured["overall"]["mean_accepted_tokens"]
    assert abs(gap) <= 0.02
