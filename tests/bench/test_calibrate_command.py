"""`vispec bench calibrate` and the numbers `vispec bench estimate` takes instead of folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.bench.pairs_to_estimate import CHECKPOINTS, ROOT, TYPICAL
from vllm_vispec.bench.calibrate import hold_out, read_measured
from vllm_vispec.bench.roofline import Hardware, draft_shape, predict, target_shape
from vllm_vispec.bench.schema import (
    CELLS_FILE,
    FORMAT,
    RUN_FILE,
    CellKey,
    CellResult,
    MemoryFacts,
    Request,
    SpecCounters,
)
from vllm_vispec.cli.app import app
from vllm_vispec.utils.errors import ViSpecError

RUNNER = CliRunner()
RESULTS = ROOT / "benchmarks/results/decode_speed.json"
TARGET, HEAD = CHECKPOINTS / "target", CHECKPOINTS / "vispec_head"
PAIR = ("--target", str(TARGET), "--head", str(HEAD), "--dtype", "float32")
TRUTH = Hardware(bandwidth=3e9, flops=4e10, pass_overhead_s=1e-3)
ROUNDS = 1000


def run_folder(
    path: Path, batches: tuple[int, ...] = (1, 4, 16), ks: tuple[int, ...] = (2, 4)
) -> Path:
    """A run whose times are those of a machine with the rates `TRUTH`."""
    path.mkdir()
    (path / RUN_FILE).write_text(json.dumps({"format": FORMAT, "machine": {}, "settings": {}}))
    cells = [
        made_up(side, batch, k) for batch in batches for k in ks for side in ("plain", "vispec")
    ]
    lines = [json.dumps(cell.to_json()) + "\n" for cell in cells]
    (path / CELLS_FILE).write_text("".join(lines))
    return path


def made_up(side: str, batch: int, k: int) -> CellResult:
    shapes = target_shape(TARGET, "float32"), draft_shape(HEAD, TARGET, "float32")
    drafts = k if side == "vispec" else 0
    one = predict(*shapes, TRUTH, TYPICAL, drafts, batch, 150.5)
    seconds = 100 * one.seconds_per_token
    accepted = tuple(round(ROUNDS * share) for share in TYPICAL[:k])
    spec = SpecCounters(ROUNDS, k * ROUNDS, sum(accepted), accepted) if drafts else None
    requests = (Request("a", "charts", "x", 101, 100, 0.5, 0.5 + seconds, ()),)
    key = CellKey(side, batch, k, 0.0, -1, "tiny")
    return CellResult(key, 0, requests, 1.0, spec, MemoryFacts(), "cmd", None)


def run_command(*arguments: str) -> Any:
    return RUNNER.invoke(app, ["bench", "calibrate", *arguments])


def test_cells_held_out_of_a_run_are_predicted(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    output = tmp_path / "found.json"
    result = run_command(str(run), *PAIR, "--hold-out", "batch=4", "--output", str(output))
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    assert found["hardware"]["bandwidth"] == pytest.approx(TRUTH.bandwidth, rel=0.01)
    assert found["held_out"]["cells"] == 4
    assert found["held_out"]["decode_speedup"]["worst_error"] < 0.01
    rows = [line for line in result.output.splitlines() if "| held out |" in line]
    assert {row.split("|")[1].strip() for row in rows if row.startswith("| 4 ")} == {"4"}
    assert sum(row.startswith("| 4 | plain |") for row in rows) == 2
    assert "| batch | K | cell |" in result.output


@pytest.mark.parametrize("text", ["batch", "batch=", "side=3", "k=x"])
def test_hold_out_that_is_not_understood(text: str) -> None:
    with pytest.raises(ViSpecError, match="use every-third, batch=16,32 or k=5"):
        hold_out(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"side": "eagle"}, "no finished cell of --side eagle"),
        ({"path": "missing.json"}, r"cannot be read .*No such file"),
        ({"path": "wrong.json"}, r"cannot be read as a result of .*KeyError"),
        ({"path": str(RESULTS), "context": None}, "give --context"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "wrong.json").write_text('{"results": [{"num_speculative_tokens": 3}]}')
    run = run_folder(tmp_path / "run", (1,), (2,))
    given = {"path": str(run), "side": "vispec", "context": 100.0, **change}
    with pytest.raises(ViSpecError, match=said):
        read_measured(tmp_path / given["path"], given["side"], given["context"])


# Keys and values by number

NUMBERS = {
    "--target-parameters": "6.5e9",
    "--head-parameters": "2.5e8",
    "--lm-head-parameters": "5.4e8",
    "--bandwidth-gbs": "2600",
    "--tflops": "590",
    "--acceptance-rate": "0.7",
    "-k": "3",
    "--batch-size": "32",
    "--context": "4000",
}
