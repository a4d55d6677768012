"""Tuning on the shipped pair, with real servers and the real load generator.

Which K wins is a matter of time, so nothing here asks for it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from examples.tiny_vlm.shipped import SIBLING
from tests.bench.fakes import HEAD, TARGET
from vllm_vispec.bench.metrics import baseline_key, by_key, measure
from vllm_vispec.bench.schema import BenchRun
from vllm_vispec.cli.app import app

pytestmark = [
    pytest.mark.engine,
    pytest.mark.serve,
    pytest.mark.slow,
    pytest.mark.usefixtures("as_a_user"),
]

SERVE = "--dtype float32 --max-model-len 1024 --enforce-eager"
LOADS = (1, 3)
PATH = "spec_llava:0.9"


def call(command: str, data: Path, output: Path, *more: str, head: str = str(HEAD)) -> str:
    """Run a command on the pair and return what it says."""
    pair = ["--target", str(TARGET), "--head", head, "--dataset", "tiny", "--data", str(data)]
    small = ["--repetitions", "1", "--waves", "1", "--least", "6", "--max-tokens", "24"]
    loads = ["--concurrency", ",".join(map(str, LOADS)), "--serve", SERVE]
    given = ["bench", command, *pair, "--output", str(output), *small, *loads, *more]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def check_outputs(run: BenchRun, variants: set[str]) -> None:
    """All cells are there, and every answer is plain vLLM's."""
    groups = by_key(run.cells)
    assert {key.variant for key in groups} == variants
    for key, cells in groups.items():
        assert [cell.error for cell in cells] == [None], key
        if key.variant != "plain":
            assert measure("identical_outputs", cells, groups[baseline_key(key)]) == 1.0, key


def test_a_schedule_under_load(questions: Path, tmp_path: Path) -> None:
    ranges = [[1, 1, 4], [2, 16, 0]]
    variants = ("plain", "vispec_tuned")
    more = ("--variants", ",".join(variants), "--schedule", json.dumps(ranges))
    call("run", questions, tmp_path, *more)
    run = BenchRun.load(tmp_path)
    check_outputs(run, set(variants))
    spec = {cell.key.concurrency: cell.spec for cell in run.cells if cell.spec is not None}
    alone, busy = spec[1], spec[3]
    assert alone.accepted_tokens / alone.steps > 2
    # A draft is made only while one request is left.
    assert busy.steps < alone.steps / 2


@pytest.mark.parametrize("head", [str(HEAD), SIBLING], ids=["head", "published model"])
def test_tune(questions: Path, tmp_path: Path, head: str) -> None:
    more = ("-k", "4", "--no-verify", "--thresholds", PATH)
    said = call("tune", questions, tmp_path, *more, head=head)
    run = BenchRun.load(tmp_path / "measured")
    check_outputs(run, {"plain", "vispec", PATH})
    drafted = {
        cell.key.variant: cell.spec.draft_tokens / cell.spec.steps
        for cell in run.cells
        if cell.spec is not None and cell.key.concurrency == 1
    }
    assert drafted["vispec"] == 4
    # The sibling is sure of these few answers.
    assert drafted[PATH] < 4 or head == SIBLING
    found = json.loads((tmp_path / "tune.json").read_text())
    names = ("variant", "concurrency", "num_speculative_tokens")
    assert {tuple(row[name] for name in names) for row in found["rows"]} == {
        (variant, load, 4) for variant in ("vispec", PATH) for load in LOADS
    }
    config = found["speculative_config"]
    if config is None:
        assert "serve without it" in said
        return
    assert f"--speculative-config '{json.dumps(config)}'" in said
