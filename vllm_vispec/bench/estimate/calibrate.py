"""Rates and overhead from measured cells, and how far off the model is on cells held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import exp, log
from statistics import mean
from typing import Any

from vllm_vispec.bench.estimate.measured import MeasuredCell
from vllm_vispec.bench.estimate.roofline import (
    Acceptance,
    Hardware,
    PassShape,
    Prediction,
    Workload,
    predict,
)
from vllm_vispec.errors import ViSpecError

MIN_CELLS = 3
# Where the fit begins: overhead in s, bytes/s, FLOP/s. It ends at the best of them.
_STARTS = ((1e-4, 1e-2), (1e10, 1e12), (1e11, 1e14))


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

    def cells_to_markdown(self) -> str:
        """Return every cell beside what the model says about it."""
        marked = [("fitted", one) for one in self.fitted]
        marked += [("held out", one) for one in self.held_out]
        marked.sort(key=lambda item: _place(item[1].cell))
        lines = [
            "| batch | K | cell | ms per token: measured | predicted | error | decode_speedup: "
            "measured | predicted | error |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_cell_row(name, error) for name, error in marked),
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
    ordered = sorted(cells, key=_place)
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


def _place(cell: MeasuredCell) -> tuple[int, int, float]:
    return cell.batch, cell.num_speculative_tokens, cell.context


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


def _cell_row(name: str, error: CellError) -> str:
    cell = error.cell
    speedups = (error.measured_speedup, error.predicted_speedup)
    relative = error.relative_speedup
    parts = [
        str(cell.batch),
        str(cell.num_speculative_tokens) if cell.num_speculative_tokens else "plain",
        name,
        f"{1000 * cell.seconds_per_token:.3g}",
        f"{1000 * error.predicted_s:.3g}",
        f"{error.relative:+.1%}",
        *("-" if one is None else f"{one:.2f}" for one in speedups),
        "-" if relative is None else f"{relative:+.1%}",
    ]
    return "| " + " | ".join(parts) + " |"
