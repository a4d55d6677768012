"""The bootstrap behind every interval of this repository, and the intervals of speedups.

Requests and repetitions are crossed: a resample draws the repetitions with replacement, and one
set of samples, with replacement, for all repetitions, of the variant and of the baseline. A slow
sample therefore stays slow in every repetition of a resample, and the two stay paired. With few
repetitions the interval mostly shows how samples differ. No interval of one run shows what a
machine does from day to day.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan
from random import Random
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_vispec.bench.metrics import SPEEDUPS, Cells, Numbers, align, keyed

RESAMPLES = 1000
ENDS = (0.025, 0.975)


def bootstrap(
    table: NDArray[Any] | Sequence[Any],
    unit_axes: Sequence[int],
    statistic: Callable[[NDArray[Any]], ArrayLike | None],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Numbers:
    """Return the ends of a statistic's 95 % interval, ``[2, ...]``: all low ends, all high ends.

    A resample draws the units along each axis with replacement. Two axes are crossed: the same
    questions are drawn for every drawn repetition. Along the other axes nothing is drawn, so what
    lies there stays paired, e.g. two variants that answered the same questions. The same call gives
    the same numbers.

    Args:
        table: numbers, or any objects.
        unit_axes: where units lie that stand for others of their kind.
        statistic: of a drawn table, which has the shape of `table`; None where it has no value.
            Such resamples are left out. Without a value, or without units, both ends are NaN.
    """
    table = np.asarray(table, dtype=None if isinstance(table, np.ndarray) else object)
    sizes = [table.shape[axis] for axis in unit_axes]
    if 0 in sizes:
        return np.full(2, np.nan)
    generator = np.random.default_rng(Random(seed).getrandbits(64))
    times = [generator.multinomial(size, np.full(size, 1 / size), size=resamples) for size in sizes]
    found = []
    for counts in zip(*times, strict=True):
        drawn = table
        for axis, count in zip(unit_axes, counts, strict=True):
            drawn = drawn.repeat(count, axis=axis)
        value = statistic(drawn)
        if value is not None:
            found.append(value)
    return np.quantile(np.array(found or [np.nan], dtype=np.float64), ENDS, axis=0)


@dataclass(frozen=True)
class Measured:
    """A speedup and its 95 % interval.

    Attributes:
        value: None without samples that both answered.
        low, high: None if there is no interval: nothing to resample, or only one thing of a kind.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


def with_interval(name: str, cells: Cells, baseline: Cells, resamples: int = RESAMPLES) -> Measured:
    """Return a speedup of one variant with its interval; the same call gives the same numbers.

    Args:
        name: a metric of `vllm_vispec.bench.metrics.SPEEDUPS`.
        cells, baseline: as for `vllm_vispec.bench.metrics.measure`.
    """
    speedup = SPEEDUPS[name]
    cells, baseline = align(cells, baseline)
    value = speedup(cells, baseline)
    tables = [[dict(keyed(cell.requests)) for cell in side] for side in (cells, baseline)]
    every = [table for side in tables for table in side]
    shared = [key for key in every[0] if all(key in table for table in every)] if every else []
    if value is None or not shared or max(len(cells), len(shared)) < 2:
        return Measured(value)
    sums_RS4 = np.array(
        [
            [speedup.sums([(mine[key], theirs[key])]) for key in shared]
            for mine, theirs in zip(*tables, strict=True)
        ]
    )
    low, high = bootstrap(sums_RS4, (0, 1), speedup.ratio_of, resamples).tolist()
    return Measured(value) if isnan(low) else Measured(value, low, high)
