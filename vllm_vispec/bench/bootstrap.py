"""The bootstrap behind every interval of this repository."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
ENDS = (0.025, 0.975)
Numbers: TypeAlias = NDArray[np.float64]


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
