"""The bootstrap behind every interval of this repository, and the intervals of metrics.

Requests and repetitions are crossed: a resample draws the repetitions with replacement, and one
set of samples, with replacement, for all repetitions, of the variant and of the baseline. A slow
sample therefore stays slow in every repetition of a resample, and the two stay paired. With few
repetitions the interval mostly shows how samples differ. No interval of one run shows what a
machine does from day to day.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_vispec.bench.metrics import (
    Cells,
    Metric,
    Numbers,
    TimeRatio,
    Value,
    find_metric,
    keyed,
    usable,
)
from vllm_vispec.bench.schema import Request

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
    lies there stays paired, e.g. two sides that answered the same questions. The same call gives
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


Key = tuple[str, int]
Keyed = dict[Key, Request]


@dataclass(frozen=True)
class Measured:
    """A metric and its 95 % interval.

    Attributes:
        low, high: None if there is no interval: nothing to resample, or only one thing of a kind.
            For a metric with one value per position, they have one per position.
    """

    value: Value
    low: Value = None
    high: Value = None


def with_interval(
    name: str, cells: Cells, baseline: Cells = (), resamples: int = RESAMPLES, seed: int = 0
) -> Measured:
    """Return a metric of one variant with its interval; the same call gives the same numbers.

    Args:
        cells, baseline: as for `vllm_vispec.bench.metrics.measure`.

    Raises:
        ViSpecError: there is no such metric.
    """
    metric = find_metric(name)
    cells, baseline = usable(metric, cells, baseline)
    value = metric.compute(cells, baseline)
    if value is None or metric.resampled == "nothing":
        return Measured(value)
    sides = [cells, baseline] if metric.compares else [cells]
    ends = _ends(metric, value, sides, resamples, seed)
    if ends is None or np.isnan(ends).any():
        return Measured(value)
    low, high = (tuple(end) if isinstance(end, list) else end for end in ends.tolist())
    return Measured(value, low, high)


def _ends(
    metric: Metric, value: Value, sides: Sequence[Cells], resamples: int, seed: int
) -> Numbers | None:
    """Return the interval, ``[2]`` or ``[2, positions]``; None if there is nothing to draw from."""
    tables = [[dict(keyed(cell.requests)) for cell in cells] for cells in sides]
    shared = _shared_keys(tables) if metric.resampled == "requests" else []
    if max(len(sides[0]), len(shared)) < 2:
        return None
    if isinstance(metric.compute, TimeRatio):
        sums_RS4 = _sums(metric.compute, tables, shared)
        return bootstrap(sums_RS4, (0, 1), metric.compute.ratio_of, resamples, seed)
    if not shared:
        positions = len(value) if isinstance(value, tuple) else 0
        return bootstrap(sides, (1,), partial(_of_cells, metric, positions), resamples, seed)
    # Side, repetition, sample.
    requests = [[[table[key] for key in shared] for table in side] for side in tables]
    return bootstrap(requests, (1, 2), partial(_of_requests, metric, sides), resamples, seed)


def _of_cells(metric: Metric, positions: int, drawn: NDArray[Any]) -> Value:
    mine, *baseline = (tuple(cells) for cells in drawn)
    found = metric.compute(mine, baseline[0] if baseline else ())
    if isinstance(found, tuple):  # cells that drafted less accepted nothing at positions behind
        return found + (0.0,) * (positions - len(found))
    return found


def _of_requests(metric: Metric, sides: Sequence[Cells], drawn: NDArray[Any]) -> Value:
    mine, *baseline = (
        tuple(replace(cells[0], requests=tuple(requests)) for requests in side)
        for cells, side in zip(sides, drawn, strict=True)
    )
    return metric.compute(mine, baseline[0] if baseline else ())


def _sums(metric: TimeRatio, tables: Sequence[Sequence[Keyed]], shared: Sequence[Key]) -> Numbers:
    """Return what the metric sums up, for each of R repetitions and S samples, ``[R, S, 4]``.

    Without shared samples a repetition is drawn as a whole, S = 1.
    """
    drawn = [[key] for key in shared] or None
    rows = []
    for mine, theirs in zip(*tables, strict=True):
        common = drawn or [[key for key in mine if key in theirs]]
        rows.append([metric.sums((mine[key], theirs[key]) for key in keys) for keys in common])
    return np.array(rows)


def _shared_keys(tables: Sequence[Sequence[Keyed]]) -> list[Key]:
    """Return the keys that every cell has, in the order of the first cell."""
    every = [table for side in tables for table in side]
    return [key for key in every[0] if all(key in table for table in every)]
