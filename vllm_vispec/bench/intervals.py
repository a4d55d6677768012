"""Bootstrap intervals of metrics, over requests and repetitions.

Requests and repetitions are crossed: a resample draws the repetitions with replacement, and one
set of samples, with replacement, for all of them and for both sides. So a slow sample stays slow
in every repetition of a resample, and sides stay paired. With few repetitions the interval mostly
shows how samples differ; what a machine does from day to day no interval of one run shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from vllm_vispec.bench.metrics import Metric, Value, find_metric, usable
from vllm_vispec.bench.pairing import Cells, keyed, percentile
from vllm_vispec.bench.schema import CellResult, Request
from vllm_vispec.bench.time_ratio import Numbers, TimeRatio

RESAMPLES = 1000
LEVEL = 0.95
Keyed = dict[tuple[str, int], Request]


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
    name: str, cells: Cells, plain: Cells = (), resamples: int = RESAMPLES, seed: int = 0
) -> Measured:
    """Return a metric of one side with its interval; the same call gives the same numbers.

    Args:
        cells, plain: as for `vllm_vispec.bench.metrics.measure`.

    Raises:
        ViSpecError: there is no such metric.
    """
    metric = find_metric(name)
    cells, plain = usable(metric, cells, plain)
    value = metric.compute(cells, plain)
    if value is None:
        return Measured(None)
    low, high = _interval(_resampled(metric, cells, plain, resamples, Random(seed)))
    return Measured(value, low, high)


def _resampled(
    metric: Metric, cells: Cells, plain: Cells, resamples: int, generator: Random
) -> list[Value]:
    """Return the metric of every resample; none if there is nothing to draw from."""
    repetitions = range(len(cells))
    tables = [[dict(keyed(cell.requests)) for cell in side] for side in (cells, plain)]
    shared = _shared_keys(tables[0] + tables[1]) if metric.resampled == "requests" else []
    if metric.resampled == "nothing" or (len(repetitions) < 2 and len(shared) < 2):
        return []
    if isinstance(metric.compute, TimeRatio):
        table_RS4 = _sums(metric.compute, tables, shared)
        return list(_resampled_ratios(metric.compute, table_RS4, resamples, generator))
    values = []
    for _ in range(resamples):
        drawn = generator.choices(repetitions, k=len(repetitions))
        keys = generator.choices(shared, k=len(shared)) if shared else None
        sides = [
            [_redraw(side[i], table[i], keys) for i in drawn] if side else ()
            for side, table in zip((cells, plain), tables, strict=True)
        ]
        values.append(metric.compute(sides[0], sides[1]))
    return values


def _sums(
    metric: TimeRatio, tables: Sequence[Sequence[Keyed]], shared: Sequence[tuple[str, int]]
) -> Numbers:
    """Return what the metric sums up, for each of R repetitions and S samples, ``[R, S, 4]``.

    Without shared samples a repetition is drawn as a whole, S = 1.
    """
    drawn = [[key] for key in shared] or None
    rows = []
    for mine, theirs in zip(*tables, strict=True):
        common = drawn or [[key for key in mine if key in theirs]]
        rows.append([metric.sums((mine[key], theirs[key]) for key in keys) for keys in common])
    return np.array(rows)


def _resampled_ratios(
    metric: TimeRatio, table_RS4: Numbers, resamples: int, generator: Random
) -> list[float]:
    """Draw repetitions and samples B times; how often each was drawn decides a sum."""
    numbers = np.random.default_rng(generator.getrandbits(64))
    repetitions, samples = table_RS4.shape[:2]
    drawn_BR = _counts(numbers, resamples, repetitions)
    drawn_BS = _counts(numbers, resamples, samples)
    sums_B4 = np.einsum("br,bs,rsk->bk", drawn_BR, drawn_BS, table_RS4, optimize=True)
    return metric.of_sums(sums_B4)


def _counts(numbers: np.random.Generator, resamples: int, size: int) -> Numbers:
    """Return how often each of so many things was drawn, ``[resamples, size]``."""
    return numbers.multinomial(size, np.full(size, 1 / size), size=resamples).astype(np.float64)


def _shared_keys(tables: Sequence[Keyed]) -> list[tuple[str, int]]:
    """Keys that every cell has, in the order of the first cell."""
    return [key for key in tables[0] if all(key in table for table in tables)]


def _redraw(cell: CellResult, table: Keyed, keys: Sequence[tuple[str, int]] | None) -> CellResult:
    if keys is None:
        return cell
    return replace(cell, requests=tuple(table[key] for key in keys))


def _interval(values: Sequence[Value]) -> tuple[Value, Value]:
    """Return the ends of the interval, position by position if values are tuples."""
    rows = [
        value if isinstance(value, tuple) else (value,) for value in values if value is not None
    ]
    if not rows:
        return None, None
    tail = (1 - LEVEL) / 2
    columns = list(zip(*rows, strict=False))
    low = tuple(percentile(column, tail) or 0.0 for column in columns)
    high = tuple(percentile(column, 1 - tail) or 0.0 for column in columns)
    if isinstance(values[0], tuple):
        return low, high
    return low[0], high[0]
