"""`vispec bench calibrate`: fits the model to measured cells, and says how far off it is.

A table of cells has these columns:

    batch                   sequences decoded at once; of a run, the concurrency
    num_speculative_tokens  0 for plain decoding
    context                 mean tokens per sequence, half of the answer included
    acceptance              share of steps that accept each position; empty for plain decoding
    seconds_per_token       decode seconds per output token of one sequence
    group                   cells of one group were measured side by side (of a run, its K)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    import pandas as pd

EVERY_THIRD, MIN_CELLS = "every-third", 3
ORDER = ["batch", "num_speculative_tokens", "context"]
# Where the fit begins, and its limits: overhead in s, bytes/s, FLOP/s.
_STARTS = ((1e-4, 1e-2), (1e10, 1e12), (1e11, 1e14))
_LIMITS = ((1e-9, 1e6, 1e6), (10.0, 1e16, 1e19))


class CalibrateOptions(Settings):
    """What is calibrated."""

    target: Path = Field(description="Target's folder; config.json is enough.")
    head: Path = Field(description="Head's folder, in any checkpoint format.")
    variant: str = Field("vispec", description="Variant of the run beside plain.")
    hold_out: str = Field(
        EVERY_THIRD, description="Cells to predict unseen: every-third, batch=16,32 or k=5."
    )
    dtype: str | None = Field(None, description="As measured; default: config.json's.")
    draft_vocab: int | None = Field(None, description="Rows of a smaller lm_head for the draft.")
    context: float | None = Field(
        None, description="Tokens per sequence, where the file does not tell."
    )


def calibrate_run(run: Path, options: CalibrateOptions) -> dict[str, Any]:
    """Read what was measured and calibrate on it; see `read_measured` and `calibrate`."""
    return calibrate(
        read_measured(run, options.variant, options.context),
        target_shape(options.target, options.dtype),
        draft_shape(options.head, options.target, options.dtype, options.draft_vocab),
        options.hold_out,
    )


def read_measured(path: Path, variant: str, context: float | None = None) -> pd.DataFrame:
    """Read the cells of a run folder, or of a result file of `python -m benchmarks decode-speed`.

    Args:
        variant: of a run folder, what is compared with plain decoding.
        context: tokens per sequence; of a result file only, which does not tell.

    Raises:
        ViSpecError: nothing usable is there.
    """
    if path.is_dir():
        cells = measured_cells(BenchRun.load(path), variant)
        if not cells.num_speculative_tokens.any():
            raise ViSpecError(f"{path} has no finished cell of --variant {variant}: name another")
        return cells
    if context is None:
        raise ViSpecError(f"{path} does not tell the tokens per sequence: give --context")
    rows = []
    try:
        for one in json.loads(path.read_text(encoding="utf-8"))["results"]:
            k, accepted = one["num_speculative_tokens"], one["acceptance_rate_per_position"]
            rows.append((1, 0, context, (), 1 / one["plain_tokens_per_second"], k))
            rows.append((1, k, context, tuple(accepted), 1 / one["vispec_tokens_per_second"], k))
    except (OSError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ViSpecError(
            f"{path} cannot be read as a result of `python -m benchmarks decode-speed` "
            f"({error!r}): give one, or the folder of a `vispec bench run`"
        ) from error
    return _table(rows)


def measured_cells(run: BenchRun, variant: str) -> pd.DataFrame:
    """Return the plain cells and those of a variant, repetitions pooled, without what failed."""
    from vllm_vispec.bench.metrics import BASELINE, acceptance_rates, by_key, decoded

    usable = (c for c in run.cells if c.key.variant in (BASELINE, variant) and c.error is None)
    rows = []
    for key, pool in by_key(usable).items():
        group, requests = key.num_speculative_tokens, decoded(pool)
        k, acceptance = (0, ()) if key.variant == BASELINE else (group, acceptance_rates(pool))
        seconds = sum(one.decode_s for one in requests)
        if seconds > 0 and acceptance is not None:
            context = mean(one.prompt_tokens + one.output_tokens / 2 for one in requests)
            per_token = seconds / sum(one.output_tokens - 1 for one in requests)
            rows.append((key.concurrency, k, context, acceptance, per_token, group))
    return _table(rows)


def _table(rows: list[Any]) -> pd.DataFrame:
    import pandas as pd

    found = pd.DataFrame(rows, columns=[*ORDER, "acceptance", "seconds_per_token", "group"])
    return found.sort_values(ORDER, kind="stable", ignore_index=True)


def held_out(cells: pd.DataFrame, text: str) -> pd.Series:
    """Return which cells `--hold-out` means: "batch=16,32", "k=5", or `EVERY_THIRD`.

    Raises:
        ViSpecError: it is none of these.
    """
    if text == EVERY_THIRD:
        return cells.index.to_series() % 3 == 1
    name, _, values = text.partition("=")
    try:
        # With a K, the plain cells that were measured beside it, too.
        column = {"batch": "batch", "k": "group"}[name]
        return cells[column].isin([int(value) for value in values.split(",")])
    except (KeyError, ValueError) as error:
        raise ViSpecError(
            f"--hold-out {text} is not understood: use {EVERY_THIRD}, batch=16,32 or k=5"
        ) from error


def calibrate(
    cells: pd.DataFrame, target: PassShape, draft: PassShape, hold_out: str = EVERY_THIRD
) -> dict[str, Any]:
    """Fit overhead, bandwidth and peak to measured cells, and predict all of them.

    The same cells give the same result. Where time goes into launching kernels, the bandwidth takes
    up what grows with a model's size. Unless `compute_seen`, no fitted pass was limited by compute
    and `flops` is only a lower limit. Errors are predicted / measured - 1.

    Raises:
        ViSpecError: fewer than three cells to fit, or `hold_out` is not understood.
    """
    is_held = held_out(cells, hold_out)
    if (~is_held).sum() < MIN_CELLS:
        raise ViSpecError(
            f"{(~is_held).sum()} measured cells are too few to calibrate on: measure at least "
            f"{MIN_CELLS} more than are held out"
        )
    hardware = _fit(cells[~is_held], target, draft)
    found = _predict(cells, target, draft, hardware)
    compared = cells.assign(
        held_out=is_held,
        predicted_seconds_per_token=[one.seconds_per_token for one in found],
        decode_speedup=[_measured_speedup(cell, cells) for cell in cells.itertuples()],
        predicted_decode_speedup=[one.decode_speedup for one in found],
    )
    for number in ("seconds_per_token", "decode_speedup"):
        compared[f"{number}_error"] = compared[f"predicted_{number}"] / compared[number] - 1
    fitted = [one for one, held in zip(found, is_held, strict=True) if not held]
    return {
        "kind": "estimate",
        "hardware": asdict(hardware),
        "compute_seen": any("compute" in (one.plain_bound, one.verify_bound) for one in fitted),
        "fitted": _summary(compared[~is_held]),
        "held_out": _summary(compared[is_held]),
        "cells": json.loads(compared.to_json(orient="records", double_precision=15)),
    }


def _predict(
    cells: pd.DataFrame, target: PassShape, draft: PassShape, hardware: Hardware
) -> list[Prediction]:
    names = ("acceptance", "num_speculative_tokens", "batch", "context")
    work = zip(*(cells[name] for name in names), strict=True)
    return [predict(target, draft, hardware, *one) for one in work]


def _fit(cells: pd.DataFrame, target: PassShape, draft: PassShape) -> Hardware:
    """Minimise the sum of log(predicted / measured)^2 of the seconds per token."""
    import numpy as np
    from scipy.optimize import least_squares

    def hardware(point: Any) -> Hardware:
        overhead, bandwidth, flops = np.exp(point).tolist()
        return Hardware(bandwidth, flops, overhead)

    def residuals(point: Any) -> Any:
        found = _predict(cells, target, draft, hardware(point))
        return np.log([one.seconds_per_token for one in found] / cells.seconds_per_token)

    starts = product(*_STARTS)
    fits = [least_squares(residuals, np.log(one), bounds=np.log(_LIMITS)) for one in starts]
    return hardware(min(fits, key=lambda fit: fit.cost).x)


def _measured_speedup(cell: Any, cells: pd.DataFrame) -> float:
    """Return the decode_speedup over the nearest plain cell; NaN of a plain cell, or without."""
    plain = cells[(cells.num_speculative_tokens == 0) & (cells.batch == cell.batch)]
    if not cell.num_speculative_tokens or plain.empty:
        return float("nan")
    far = (plain.context - cell.context).abs()
    nearest = plain.assign(other=plain.group != cell.group, far=far).sort_values(["other", "far"])
    return float(nearest.seconds_per_token.iloc[0] / cell.seconds_per_token)


def _summary(cells: pd.DataFrame) -> dict[str, Any]:
    summary: dict[str, Any] = {"cells": len(cells)}
    for number in ("seconds_per_token", "decode_speedup"):
        errors = cells[f"{number}_error"].abs().dropna()
        found = {"mean_error": errors.mean(), "worst_error": errors.max()}
        summary[number] = {k: None if errors.empty else round(v, 4) for k, v in found.items()}
    return summary


def calibration_to_markdown(found: Mapping[str, Any]) -> str:
    """Return the rates and the errors in a few lines, then every cell beside its prediction."""
    from vllm_vispec.bench.pages import to_markdown

    return to_markdown("calibration.md.j2", found=found)
