"""Rates and overhead from measured cells, and how far off the model is on cells held out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import exp, log
from statistics import mean
from typing import Any

from vllm_vispec.bench.estimate.roofline import (
    Acceptance,
    Hardware,
    PassShape,
    Prediction,
    Workload,
    predict,
)
from vllm_vispec.bench.schema import BenchRun, CellKey, CellResult
from vllm_vispec.errors import ViSpecError

PLAIN = "plain"
MIN_CELLS = 3
# Where the fit begins: overhead in s, bytes/s, FLOP/s. It ends at the best of them.
_STARTS = ((1e-4, 1e-2), (1e10, 1e12), (1e11, 1e14))


@dataclass(frozen=True)
class MeasuredCell:
    """What one cell of a run says about decoding.

    Attributes:
        batch: sequences decoded at once; of a run, the concurrency.
        num_speculative_tokens: 0 for plain decoding.
        context: mean tokens per sequence, half of the answer included.
        acceptance: share of rounds that accept each position; empty for plain decoding.
        seconds_per_token: decode seconds per output token of one sequence.
        group: cells of one group were measured side by side (of a run, its K).
    """

    batch: int
    num_speculative_tokens: int
    context: float
    acceptance: tuple[float, ...]
    seconds_per_token: float
    group: int = 0


@dataclass(frozen=True)
class CellError:
    """A measured cell and what the model says about it.

    Attributes:
        predicted_s: seconds per token by the model.
        predicted_speedup, measured_speedup: decode_speedup against the plain cell of the same
            batch; None for plain cells, and where there is none.
    """

    cell: MeasuredCell
    predicted_s: float
    predicted_speedup: float | None = None
    measured_speedup: float | None = None

    @property
    def relative(self) -> float:
        """Error of the seconds per token: predicted / measured - 1."""
        return self.predicted_s / self.cell.seconds_per_token - 1

    @property
    def relative_speedup(self) -> float | None:
        """Error of decode_speedup: predicted / measured - 1."""
        if self.predicted_speedup is None or not self.measured_speedup:
            return None
        return self.predicted_speedup / self.measured_speedup - 1


@dataclass(frozen=True)
class Calibration:
    """What was fitted.

    Attributes:
        hardware: effective rates and overhead. On a machine where time goes into launching
            kernels, the bandwidth takes up what grows with a model's size.
        compute_seen: some fitted pass was limited by compute; else `hardware.flops` is only a
            lower limit and says nothing about larger batches.
        fitted, held_out: errors on the cells used, and on those left out.
    """

    hardware: Hardware
    compute_seen: bool
    fitted: tuple[CellError, ...]
    held_out: tuple[CellError, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, marked as an estimate."""
        return {
            "kind": "estimate",
            "hardware": asdict(self.hardware),
            "compute_seen": self.compute_seen,
            "fitted": _summary(self.fitted),
            "held_out": _summary(self.held_out),
            "cells": [_plain_error(error) for error in (*self.fitted, *self.held_out)],
        }

    def to_markdown(self) -> str:
        """Return the rates and the errors in a few lines."""
        compute = (
            f"{self.hardware.flops / 1e9:.4g} GFLOP/s"
            if self.compute_seen
            else "peak not seen (no pass was limited by it)"
        )
        rates = self.hardware
        lines = [
            f"**estimate**, fitted to {len(self.fitted)} cells: {1000 * rates.pass_overhead_s:.3g} "
            f"ms overhead per pass, {rates.bandwidth / 1e9:.4g} GB/s effective, {compute}",
            "",
            "| cells | number | seconds per token: mean error | worst | decode_speedup: mean error "
            "| worst |",
            "|---|---|---|---|---|---|",
            _markdown_row("fitted", self.fitted),
            _markdown_row("held out", self.held_out),
        ]
        return "\n".join(lines) + "\n"


def calibrate(
    cells: Sequence[MeasuredCell],
    target: PassShape,
    draft: PassShape,
    hold_out: Callable[[MeasuredCell], bool] | None = None,
) -> Calibration:
    """Fit overhead, bandwidth and peak to measured cells.

    Minimises the sum of log(predicted / measured)^2 of the seconds per token over the logarithms
    of the three, from several starts; the same cells give the same result.

    Args:
        hold_out: cells that are not used for the fit but only to tell the error; None: every third
            one in the order of batch size and K.

    Raises:
        ViSpecError: fewer than three cells to fit, or a cell without a time.
    """
    ordered = sorted(cells, key=lambda one: (one.batch, one.num_speculative_tokens, one.context))
    if any(cell.seconds_per_token <= 0 for cell in ordered):
        raise ViSpecError("a measured cell has no decode time: leave it out of the calibration")
    choose = hold_out or _every_third(ordered)
    used = [cell for cell in ordered if not choose(cell)]
    if len(used) < MIN_CELLS:
        raise ViSpecError(
            f"{len(used)} measured cells are too few to calibrate on: measure at least {MIN_CELLS} "
            "more than are held out"
        )
    hardware = _fit(used, target, draft)
    found = {id(cell): _predict(cell, target, draft, hardware) for cell in ordered}
    errors = {id(cell): _error(cell, found[id(cell)], ordered) for cell in ordered}
    bounds = {b for cell in used for b in _bounds(found[id(cell)])}
    return Calibration(
        hardware,
        "compute" in bounds,
        tuple(errors[id(cell)] for cell in used),
        tuple(errors[id(cell)] for cell in ordered if choose(cell)),
    )


def measured_cells(run: BenchRun, side: str) -> tuple[MeasuredCell, ...]:
    """Take the plain cells and those of a side out of a run; repetitions are pooled.

    Failed cells and failed requests are left out, and so are cells in which nothing was decoded.
    """
    pools: dict[CellKey, list[CellResult]] = defaultdict(list)
    for cell in run.cells:
        if cell.key.side in (PLAIN, side) and cell.error is None:
            pools[cell.key].append(cell)
    found = [_measured(key, pool) for key, pool in pools.items()]
    return tuple(cell for cell in found if cell is not None)


def _measured(key: CellKey, pool: Sequence[CellResult]) -> MeasuredCell | None:
    requests = [
        one for cell in pool for one in cell.requests if one.error is None and one.output_tokens > 1
    ]
    seconds = sum(one.decode_s for one in requests)
    if seconds <= 0:
        return None
    acceptance: tuple[float, ...] = ()
    if key.side != PLAIN:
        spec = [cell.spec for cell in pool if cell.spec is not None]
        rounds = sum(one.rounds for one in spec)
        if not rounds:
            return None
        by_position = zip(*(one.accepted_by_position for one in spec), strict=True)
        acceptance = tuple(sum(counts) / rounds for counts in by_position)
    return MeasuredCell(
        batch=key.concurrency,
        num_speculative_tokens=0 if key.side == PLAIN else key.num_speculative_tokens,
        context=mean(one.prompt_tokens + one.output_tokens / 2 for one in requests),
        acceptance=acceptance,
        seconds_per_token=seconds / sum(one.output_tokens - 1 for one in requests),
        group=key.num_speculative_tokens,
    )


def _every_third(ordered: Sequence[MeasuredCell]) -> Callable[[MeasuredCell], bool]:
    # Decided by place, the cells themselves may be equal.
    held = {id(cell) for cell in ordered[1::3]}
    return lambda cell: id(cell) in held


def _predict(
    cell: MeasuredCell, target: PassShape, draft: PassShape, hardware: Hardware
) -> Prediction:
    work = Workload(cell.batch, cell.context)
    accepted = Acceptance(cell.acceptance)
    return predict(target, draft, hardware, work, accepted, cell.num_speculative_tokens)


def _fit(cells: Sequence[MeasuredCell], target: PassShape, draft: PassShape) -> Hardware:
    from scipy.optimize import least_squares

    def hardware(point: Sequence[float]) -> Hardware:
        overhead, bandwidth, flops = (exp(value) for value in point)
        return Hardware(bandwidth, flops, overhead)

    def residuals(point: Sequence[float]) -> list[float]:
        rates = hardware(point)
        return [
            log(_predict(cell, target, draft, rates).seconds_per_token / cell.seconds_per_token)
            for cell in cells
        ]

    lower, upper = [log(1e-9), log(1e6), log(1e6)], [log(10.0), log(1e16), log(1e19)]
    fits = [
        least_squares(residuals, [log(value) for value in start], bounds=(lower, upper))
        for start in product(*_STARTS)
    ]
    return hardware(min(fits, key=lambda fit: fit.cost).x)


def _error(cell: MeasuredCell, prediction: Prediction, cells: Sequence[MeasuredCell]) -> CellError:
    if not cell.num_speculative_tokens:
        return CellError(cell, prediction.seconds_per_token)
    plain = [one for one in cells if not one.num_speculative_tokens and one.batch == cell.batch]
    if not plain:
        return CellError(cell, prediction.seconds_per_token)
    nearest = min(plain, key=lambda one: (one.group != cell.group, abs(one.context - cell.context)))
    measured = nearest.seconds_per_token / cell.seconds_per_token
    return CellError(cell, prediction.seconds_per_token, prediction.decode_speedup, measured)


def _bounds(prediction: Prediction) -> tuple[str, str]:
    return prediction.plain_bound, prediction.verify_bound


def _summary(errors: Sequence[CellError]) -> dict[str, Any]:
    seconds = [abs(error.relative) for error in errors]
    speedups = [abs(one) for error in errors if (one := error.relative_speedup) is not None]
    return {
        "cells": len(errors),
        "seconds_per_token": _mean_and_worst(seconds),
        "decode_speedup": _mean_and_worst(speedups),
    }


def _mean_and_worst(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"mean_error": round(mean(values), 4), "worst_error": round(max(values), 4)}


def _plain_error(error: CellError) -> dict[str, Any]:
    return {**asdict(error), "relative": error.relative, "relative_speedup": error.relative_speedup}


def _markdown_row(name: str, errors: Sequence[CellError]) -> str:
    summary = _summary(errors)
    cells = [name, str(summary["cells"])]
    for part in ("seconds_per_token", "decode_speedup"):
        found = summary[part]
        cells += ["-", "-"] if found is None else [f"{value:.1%}" for value in found.values()]
    return "| " + " | ".join(cells) + " |"
