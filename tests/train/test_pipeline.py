"""From questions to a served head, with the commands a user types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.engine import IN_PROCESS_ENV, Engine
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


def vispec(*arguments: str) -> str:
    """Run a command; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm_vispec", *arguments],
        env=os.environ | IN_PROCESS_ENV,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_regenerate_train_evaluate_export_serve(
    engine: Callable[..., Engine], tiny: TinyStore, dialogues: Path, tmp_path: Path
) -> None:
    target, answers, run = str(tiny.target("qwen2_5_vl")), tmp_path / "answers.jsonl", "run"
    vispec(
        *("regenerate", "--target", target, "--input", str(dialogues), "--output", str(answers)),
        *("--temperature", "0", "--prompt-style", "none", "--max-tokens", "24"),
        *("--dtype", "float32", "--max-model-len", "256"),
        *("--engine", '{"enforce_eager": true}'),
    )
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(written) == len(dialogues.read_text().splitlines())
    paths = {"target.model": target, "data.train": str(answers), "run.output": str(tmp_path / run)}
    vispec("train", *(part for item in (SETTINGS | paths).items() for part in _set(*item)))
    head = tmp_path / run / "head"
    vispec(
        *("eval", "--target", target, "--head", str(head), "--data", str(answers), "--engine"),
        *("-k", str(NUM_DRAFT_TOKENS), "--check-greedy", "--output", str(tmp_path / "eval.json")),
    )
    report = json.loads((tmp_path / "eval.json").read_text())
    assert "tokens_per_round" in json.dumps(report)
    check_served(engine, target, head)
    # One setting more, and the head has SpecVLM's compressor.
    paths["run.output"] = str(tmp_path / "select")
    settings = {**SETTINGS, **paths, "compressor": "select"}
    vispec("train", *(part for item in settings.items() for part in _set(*item)))
    select = tmp_path / "select" / "head"
    assert inspect_head(select).config.compressor_spec.name == "select"
    check_served(engine, target, select)


def check_served(engine: Callable[..., Engine], target: str, head: Path) -> None:
    """A head that is served by its own folder finds its target, and answers as that does."""
    plain, served = (engine("v1", model=str(model)) for model in (target, head))
    found = served.generate(PROMPTS, 24)
    assert [one.token_ids for one in found] == [
        one.token_ids for one in plain.generate(PROMPTS, 24)
    ]
    assert plain.drafts() == 0
    assert served.drafts() > 0


def _set(name: str, value: str) -> tuple[str, str]:
    return "--set", f"{name}={value}"
