"""`vispec bench calibrate`: fits the model to measured cells, and says how far off it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import exp, log
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import Field

from vllm_vispec.bench.roofline import (
    Hardware,
    PassShape,
    Prediction,
    draft_shape,
    predict,
    target_shape,
)
from vllm_vispec.bench.schema import BenchRun
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import Settings

EVERY_THIRD, MIN_CELLS = "every-third", 3
# Where the fit begins, and its limits: overhead in s, bytes/s, FLOP/s.
_STARTS = ((1e-4, 1e-2), (1e10, 1e12), (1e11, 1e14))
_LIMITS = ((1e-9, 1e6, 1e6), (10.0, 1e16, 1e19))


class CalibrateOptions(Settings):
    """What is calibrated."""

    target: Path = Field(description="Target's folder; config.json is enough.")
    head: Path = Field(description="Head's folder, in any checkpoint format.")
    side: str = Field("vispec", description="Side of the run beside plain.")
    hold_out: str = Field(
        EVERY_THIRD, description="Cells to predict unseen: every-third, batch=16,32 or k=5."
    )
    dtype: str | None = Field(None, description="As measured; default: config.json's.")
    draft_vocab: int | None = Field(None, description="Rows of a smaller lm_head for the draft.")
    context: float | None = Field(
        None, description="Tokens per sequence, where the file does not tell."
    )


@dataclass(frozen=True)
class MeasuredCell:
    """What one cell of a run says about decoding.

    Attributes:
        batch: sequences decoded at once; of a run, the concurrency.
        num_speculative_tokens: 0 for plain decoding.
        context: mean tokens per sequence, half of the answer included.
        acceptance: share of steps that accept each position; empty for plain decoding.
        seconds_per_token: decode seconds per output token of one sequence.
        group: cells of one group were measured side by side (of a run, its K).
    """

    batch: int
    num_speculative_tokens: int
    context: float
    acceptance: tuple[float, ...]
    seconds_per_token: float
    group: int = 0


HoldOut = Callable[[int, MeasuredCell], bool]
"""Says, from its place among all and itself, whether a cell is predicted but not used to fit."""


def calibrate_run(run: Path, options: CalibrateOptions) -> dict[str, Any]:
    """Calibrate on a run folder, or on a result file of `python -m benchmarks decode-speed`.

    Raises:
        ViSpecError: nothing usable is there, or an option is impossible; see `calibrate`.
    """
    return calibrate(
        read_measured(run, options.side, options.context),
        target_shape(options.target, options.dtype),
        draft_shape(options.head, options.target, options.dtype, options.draft_vocab),
        hold_out(options.hold_out),
    )


def read_measured(path: Path, side: str, context: float | None = None) -> list[MeasuredCell]:
    """Read a run folder, or a result file of `python -m benchmarks decode-speed`.

    Args:
        side: of a run folder, what is compared with plain decoding.
        context: tokens per sequence; of a result file only, which does not tell.

    Raises:
        ViSpecError: nothing usable is there.
    """
    if path.is_dir():
        cells = measured_cells(BenchRun.load(path), side)
        if not any(cell.num_speculative_tokens for cell in cells):
            raise ViSpecError(f"{path} has no finished cell of --side {side}: name one it has")
        return cells
    if context is None:
        raise ViSpecError(f"{path} does not tell the tokens per sequence: give --context")
    cells = []
    try:
        for one in json.loads(path.read_text(encoding="utf-8"))["results"]:
            k, accepted = one["num_speculative_tokens"], one["acceptance_rate_per_position"]
            plain, ours = (1 / one[f"{x}_tokens_per_second"] for x in ("plain", "vispec"))
            cells.append(MeasuredCell(1, 0, context, (), plain, k))
            cells.append(MeasuredCell(1, k, context, tuple(accepted), ours, k))
    except (OSError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ViSpecError(
            f"{path} cannot be read as a result of `python -m benchmarks decode-speed` "
            f"({error!r}): give one, or the folder of a `vispec bench run`"
        ) from error
    return cells


def measured_cells(run: BenchRun, side: str) -> list[MeasuredCell]:
    """Return the plain cells and those of a side, repetitions pooled, without what failed."""
    from vllm_vispec.bench.metrics import BASELINE, acceptance_rates, by_key, decoded

    usable = (c for c in run.cells if c.key.side in (BASELINE, side) and c.error is None)
    found = []
    for key, pool in by_key(usable).items():
        requests, is_plain = decoded(pool), key.side == BASELINE
        acceptance = () if is_plain else acceptance_rates(pool)
        seconds = sum(one.decode_s for one in requests)
        if seconds <= 0 or acceptance is None:
            continue
        found.append(
            MeasuredCell(
                batch=key.concurrency,
                num_speculative_tokens=0 if is_plain else key.num_speculative_tokens,
                context=mean(one.prompt_tokens + one.output_tokens / 2 for one in requests),
                acceptance=acceptance,
                seconds_per_token=seconds / sum(one.output_tokens - 1 for one in requests),
                group=key.num_speculative_tokens,
            )
        )
    return found


def hold_out(text: str) -> HoldOut:
    """Return what `--hold-out` means: "batch=16,32", "k=5", or `EVERY_THIRD`.

    Raises:
        ViSpecError: it is none of these.
    """
    if text == EVERY_THIRD:
        return lambda place, _: place % 3 == 1
    name, _, values = text.partition("=")
    try:
        # With a K, the plain cells that were measured beside it, too.
        attribute = {"batch": "batch", "k": "group"}[name]
        wanted = {int(value) for value in values.split(",")}
    except (KeyError, ValueError) as error:
        raise ViSpecError(
            f"--hold-out {text} is not understood: use {EVERY_THIRD}, batch=16,32 or k=5"
        ) from error
    return lambda _, cell: getattr(cell, attribute) in wanted


def calibrate(
    cells: Sequence[MeasuredCell], target: PassShape, draft: PassShape, is_held_out: HoldOut
) -> dict[str, Any]:
    """Fit overhead, bandwidth and peak to measured cells, and predict all of them.

    The same cells give the same result. Where time goes into launching kernels, the bandwidth takes
    up what grows with a model's size. Unless `compute_seen`, no fitted pass was limited by compute
    and `flops` is only a lower limit.

    Raises:
        ViSpecError: fewer than three cells to fit.
    """
    ordered = sorted(cells, key=lambda one: (one.batch, one.num_speculative_tokens, one.context))
    held = [is_held_out(place, cell) for place, cell in enumerate(ordered)]
    used = [cell for cell, is_held in zip(ordered, held, strict=True) if not is_held]
    if len(used) < MIN_CELLS:
        raise ViSpecError(
            f"{len(used)} measured cells are too few to calibrate on: measure at least {MIN_CELLS} "
            "more than are held out"
        )

    def predicted(cell: MeasuredCell, hardware: Hardware) -> Prediction:
        k = cell.num_speculative_tokens
        return predict(target, draft, hardware, cell.acceptance, k, cell.batch, cell.context)

    hardware = _fit(used, predicted)
    rows = []
    for is_held, cell in zip(held, ordered, strict=True):
        found = predicted(cell, hardware)
        measured = _measured_speedup(cell, ordered)
        rows.append(
            {
                "held_out": is_held,
                **asdict(cell),
                "predicted_seconds_per_token": found.seconds_per_token,
                "seconds_per_token_error": found.seconds_per_token / cell.seconds_per_token - 1,
                "decode_speedup": measured,
                "predicted_decode_speedup": measured and found.decode_speedup,
                "decode_speedup_error": measured and found.decode_speedup / measured - 1,
            }
        )
    passes = [predicted(cell, hardware) for cell in used]
    return {
        "kind": "estimate",
        "hardware": asdict(hardware),
        "compute_seen": any("compute" in (one.plain_bound, one.verify_bound) for one in passes),
        "fitted": _summary([row for row in rows if not row["held_out"]]),
        "held_out": _summary([row for row in rows if row["held_out"]]),
        "cells": rows,
    }


def _fit(
    cells: Sequence[MeasuredCell], predicted: Callable[[MeasuredCell, Hardware], Prediction]
) -> Hardware:
    """Minimise the sum of log(predicted / measured)^2 of the seconds per token."""
    import numpy as np
    from scipy.optimize import least_squares

    def hardware(point: Sequence[float]) -> Hardware:
        overhead, bandwidth, flops = map(exp, point)
        return Hardware(bandwidth, flops, overhead)

    def residuals(point: Sequence[float]) -> list[float]:
        rates = hardware(point)
        return [
            log(predicted(one, rates).seconds_per_token / one.seconds_per_token) for one in cells
        ]

    starts = product(*_STARTS)
    fits = [least_squares(residuals, np.log(one), bounds=np.log(_LIMITS)) for one in starts]
    return hardware(min(fits, key=lambda fit: fit.cost).x)


def _measured_speedup(cell: MeasuredCell, cells: Sequence[MeasuredCell]) -> float | None:
    """Return the decode_speedup over the nearest plain cell; None of a plain cell, or without."""
    plain = [one for one in cells if not one.num_speculative_tokens and one.batch == cell.batch]
    if not cell.num_speculative_tokens or not plain:
        return None
    beside = min(plain, key=lambda p: (p.group != cell.group, abs(p.context - cell.context)))
    return beside.seconds_per_token / cell.seconds_per_token


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Errors are predicted / measured - 1."""
    summary: dict[str, Any] = {"cells": len(rows)}
    for name in ("seconds_per_token", "decode_speedup"):
        errors = [abs(row[f"{name}_error"]) for row in rows if row[f"{name}_error"] is not None]
        summary[name] = {
            "mean_error": round(mean(errors), 4) if errors else None,
            "worst_error": round(max(errors), 4) if errors else None,
        }
    return summary


def calibration_to_markdown(found: Mapping[str, Any]) -> str:
    """Return the rates and the errors in a few lines, then every cell beside its prediction."""
    from vllm_vispec.bench.pages import to_markdown

    return to_markdown("calibration.md.j2", found=found)
