"""The cost model beside measurements."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.bench.pairs_to_estimate import (
    CHECKPOINTS,
    DRAFT,
    HARDWARE,
    ROOT,
    TARGET,
    TYPICAL,
)
from vllm_vispec.bench.calibrate import (
    MeasuredCell,
    calibrate,
    measured_cells,
)
from vllm_vispec.bench.roofline import Hardware, draft_shape, predict, target_shape
from vllm_vispec.bench.schema import (
    BenchRun,
    CellKey,
    CellResult,
    MemoryFacts,
    Request,
    SpecCounters,
)
from vllm_vispec.utils.errors import ViSpecError

# Calibration


def made_up_cells(hardware: Hardware, noise: float = 0.0) -> list[MeasuredCell]:
    cells: list[MeasuredCell] = []
    for batch in (1, 4, 16, 64, 256):
        for k in (0, 1, 2, 4, 6):
            one = predict(TARGET, DRAFT, hardware, TYPICAL, k, batch, 500)
            sign = 1 if len(cells) % 2 else -1
            seconds = one.seconds_per_token * (1 + sign * noise)
            cells.append(MeasuredCell(batch, k, 500, TYPICAL if k else (), seconds))
    return cells


def test_calibration_finds_the_rates_that_made_the_cells() -> None:
    truth = Hardware(bandwidth=2.2e12, flops=3.1e14, pass_overhead_s=4e-4)
    found = calibrate(made_up_cells(truth), TARGET, DRAFT)
    assert found["compute_seen"]
    assert found["hardware"]["bandwidth"] == pytest.approx(truth.bandwidth, rel=0.01)
    assert found["hardware"]["flops"] == pytest.approx(truth.flops, rel=0.01)
    assert found["hardware"]["pass_overhead_s"] == pytest.approx(truth.pass_overhead_s, rel=0.02)
    assert found["fitted"]["cells"] + found["held_out"]["cells"] == len(found["cells"]) == 25
    assert found["held_out"]["seconds_per_token"]["worst_error"] < 0.01
    assert found["kind"] == "estimate"


def test_the_form_of_the_model_fits_what_was_measured_on_the_shipped_pair() -> None:
    """Committed measurements, so that no clock is involved."""
    shapes = (
        target_shape(CHECKPOINTS / "target", "float32"),
        draft_shape(CHECKPOINTS / "vispec_head", CHECKPOINTS / "target", "float32"),
    )
    results = json.loads((ROOT / "benchmarks/results/decode_speed.json").read_text())["results"]
    cells = []
    for one in results:
        k, accepted = one["num_speculative_tokens"], tuple(one["accepted_at"])
        cells += [
            MeasuredCell(1, 0, 150, (), 1 / one["plain_tokens_per_second"], k),
            MeasuredCell(1, k, 150, accepted, 1 / one["vispec_tokens_per_second"], k),
        ]
    summary = calibrate(cells, *shapes)["held_out"]
    assert summary["cells"] == len(cells) // 2 - 1
    assert summary["decode_speedup"]["mean_error"] < 0.10
    assert summary["decode_speedup"]["worst_error"] < 0.20


def test_too_few_cells_are_refused() -> None:
    cells = made_up_cells(HARDWARE)[:4]
    with pytest.raises(ViSpecError, match="2 measured cells are too few"):
        calibrate(cells, TARGET, DRAFT, lambda cell: cell.num_speculative_tokens < 2)
    with pytest.raises(ViSpecError, match="no decode time"):
        calibrate([replace(cells[0], seconds_per_token=0.0), *cells], TARGET, DRAFT)


def cell(
    side: str, repetition: int, seconds: float, spec: SpecCounters | None, error: str | None = None
) -> CellResult:
    requests = (
        Request("a", "charts", "x", 11, 100, 0.5, 0.5 + seconds, ()),
        Request("b", "charts", "", 0, 0, 0.0, 0.0, (), "refused"),
    )
    key = CellKey(side, 2, 3, 0.0, -1, "tiny")
    return CellResult(key, repetition, requests, 1.0, spec, MemoryFacts(), "cmd", error)


def test_measured_cells_pool_repetitions_and_leave_failures_out() -> None:
    first, second = SpecCounters(10, 30, 15, (8, 5, 2)), SpecCounters(10, 30, 9, (6, 3, 0))
    cells = (
        cell("plain", 0, 2.0, None),
        cell("plain", 1, 4.0, None),
        cell("vispec", 0, 1.0, first),
        cell("vispec", 1, 1.0, second),
        cell("vispec", 2, 9.0, first, error="server died"),
        cell("eagle", 0, 1.0, first),
    )
    plain, ours = measured_cells(BenchRun(1, {}, {}, cells), "vispec")
    assert plain == MeasuredCell(2, 0, 105.5, (), plain.seconds_per_token, 3)
    assert plain.seconds_per_token == pytest.approx(0.3)
    assert ours.num_speculative_tokens == 3
    assert ours.acceptance == (0.7, 0.4, 0.1)
    assert ours.seconds_per_token == pytest.approx(0.1)
