"""Medians, deciles and ratios of the parts of a round, with bootstrap intervals.

Arrays: R rounds, C columns (parts, then wholes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_vispec.bench.bootstrap import RESAMPLES, bootstrap
from vllm_vispec.bench.profile.measure import Block
from vllm_vispec.bench.profile.rounds import Round
from vllm_vispec.bench.profile.settings import EAGLE, SIDES, VISPEC
from vllm_vispec.bench.schema import Record

DECILES = (0.1, 0.9)


@dataclass(frozen=True)
class Figures(Record):
    """Seconds of one side: the median, its 95 % interval if there is one, and the first decile.

    The first decile is what something costs while nothing else disturbs the machine.
    """

    median: float
    interval_95: tuple[float, float] | None
    first_decile: float


@dataclass(frozen=True)
class Comparison(Record):
    """A part on both sides. Ratios are ViSpec's over EAGLE's; None where EAGLE has no such part."""

    eagle: Figures
    vispec: Figures
    ratio: float | None
    ratio_interval_95: tuple[float, float] | None
    ratio_first_decile: float | None


@dataclass(frozen=True)
class Summary(Record):
    """One kind of round.

    Attributes:
        rounds: on each side.
        parts, wholes: by name.
        typical: for each side, mean seconds by part over the rounds whose time lies between the
            first and the last decile. Unlike medians these add up to a round.
    """

    rounds: int
    parts: dict[str, Comparison]
    wholes: dict[str, Comparison]
    typical: dict[str, dict[str, float]]


def summarise(blocks: Sequence[Block], resamples: int = RESAMPLES, seed: int = 0) -> Summary:
    """Compare the rounds of blocks, all of one kind and split alike.

    A resample of an interval draws blocks with replacement, the same for both sides: it answers how
    different a number might be for other questions of the kind or at another minute of the run.

    Args:
        blocks: at least one with a round.
    """
    blocks = [block for block in blocks if block.eagle]
    first = blocks[0].eagle[0]
    tables = {side: [_table(block.rounds(side)) for block in blocks] for side in SIDES}
    pooled = {side: np.concatenate(tables[side]) for side in SIDES}
    names = [*first.seconds, *first.wholes]
    # One block says nothing about how blocks differ: no interval.
    ends = np.full((2, len(SIDES) + 1, len(names)), np.nan)
    if len(blocks) > 1:
        ends = bootstrap(_paired(tables), (1,), _medians_and_ratio, resamples, seed)
    compared = {
        name: _compare({side: pooled[side][:, place] for side in SIDES}, ends[..., place])
        for place, name in enumerate(names)
    }
    return Summary(
        rounds=len(pooled[EAGLE]),
        parts={name: compared[name] for name in first.seconds},
        wholes={name: compared[name] for name in first.wholes},
        typical={side: _typical(pooled[side], first) for side in SIDES},
    )


def _table(rounds: Sequence[Round]) -> np.ndarray:
    """Return seconds, ``[R, C]``."""
    return np.array([[*one.seconds.values(), *one.wholes.values()] for one in rounds])


def _paired(tables: dict[str, list[np.ndarray]]) -> NDArray[Any]:
    """Return the tables of all blocks, ``[sides, blocks]``."""
    paired = np.empty((len(SIDES), len(tables[EAGLE])), dtype=object)
    for place, side in enumerate(SIDES):
        paired[place] = np.fromiter(tables[side], dtype=object)
    return paired


def _medians_and_ratio(drawn: NDArray[Any]) -> np.ndarray:
    """Return EAGLE's medians, ViSpec's, and their ratio (NaN where EAGLE has none), ``[3, C]``."""
    eagle, vispec = (np.median(np.concatenate(list(side)), axis=0) for side in drawn)
    ratio = np.divide(vispec, eagle, out=np.full_like(eagle, np.nan), where=eagle > 0)
    return np.stack([eagle, vispec, ratio])


def _compare(seconds: dict[str, np.ndarray], ends: np.ndarray) -> Comparison:
    """Compare a part; `ends` are those of `_medians_and_ratio`, ``[2, 3]``."""
    eagle = _figures(seconds[EAGLE], ends[:, 0])
    vispec = _figures(seconds[VISPEC], ends[:, 1])
    return Comparison(
        eagle,
        vispec,
        _ratio(vispec.median, eagle.median),
        _interval(ends[:, 2]),
        _ratio(vispec.first_decile, eagle.first_decile),
    )


def _figures(seconds: np.ndarray, ends: np.ndarray) -> Figures:
    first_decile = float(np.quantile(seconds, DECILES[0]))
    return Figures(float(np.median(seconds)), _interval(ends), first_decile)


def _interval(ends: np.ndarray) -> tuple[float, float] | None:
    """Return the ends as numbers; a NaN in a resample made both of them NaN."""
    low, high = ends.tolist()
    return None if np.isnan(low) else (low, high)


def _ratio(above: float, below: float) -> float | None:
    return above / below if below > 0 else None


def _typical(table: np.ndarray, first: Round) -> dict[str, float]:
    totals = table[:, len(first.seconds) + list(first.wholes).index("round")]
    low, high = np.quantile(totals, DECILES)
    middle = (totals >= low) & (totals <= high)
    # Of two rounds none lies between the deciles.
    means = (table[middle] if middle.any() else table).mean(axis=0)
    return {name: float(means[place]) for place, name in enumerate(first.seconds)}
