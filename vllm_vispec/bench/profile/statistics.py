"""Medians, deciles and ratios of the parts of a round, with bootstrap intervals.

Arrays: R rounds, C columns (parts, then wholes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_vispec.bench.profile.measure import Block
from vllm_vispec.bench.profile.rounds import Round
from vllm_vispec.bench.profile.settings import EAGLE, SIDES, VISPEC
from vllm_vispec.bench.schema import Record

RESAMPLES = 1000
ENDS = (0.025, 0.975)
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
    # One block says nothing about how blocks differ: no resample, no interval.
    resamples = resamples if len(blocks) > 1 else 0
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(blocks), size=(resamples, len(blocks)))
    medians = {side: _resampled(tables[side], draws) for side in SIDES}
    pooled = {side: np.concatenate(tables[side]) for side in SIDES}
    names = [*first.seconds, *first.wholes]
    compared = {
        name: _compare(
            {side: pooled[side][:, place] for side in SIDES},
            {side: medians[side][:, place] for side in SIDES},
        )
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


def _resampled(tables: Sequence[np.ndarray], draws: np.ndarray) -> np.ndarray:
    """Return the medians of every resample, ``[resamples, C]``."""
    found = [np.median(np.concatenate([tables[block] for block in draw]), axis=0) for draw in draws]
    return np.reshape(found, (len(draws), tables[0].shape[1]))


def _compare(seconds: dict[str, np.ndarray], resampled: dict[str, np.ndarray]) -> Comparison:
    figures = {side: _figures(seconds[side], resampled[side]) for side in SIDES}
    eagle, vispec = figures[EAGLE], figures[VISPEC]
    interval = None
    if (resampled[EAGLE] > 0).all():
        interval = _ends(resampled[VISPEC] / resampled[EAGLE])
    return Comparison(
        eagle,
        vispec,
        _ratio(vispec.median, eagle.median),
        interval,
        _ratio(vispec.first_decile, eagle.first_decile),
    )


def _figures(seconds: np.ndarray, resampled: np.ndarray) -> Figures:
    first_decile = float(np.quantile(seconds, DECILES[0]))
    return Figures(float(np.median(seconds)), _ends(resampled), first_decile)


def _ends(values: np.ndarray) -> tuple[float, float] | None:
    if not len(values):
        return None
    low, high = np.quantile(values, ENDS)
    return float(low), float(high)


def _ratio(above: float, below: float) -> float | None:
    return above / below if below > 0 else None


def _typical(table: np.ndarray, first: Round) -> dict[str, float]:
    totals = table[:, len(first.seconds) + list(first.wholes).index("round")]
    low, high = np.quantile(totals, DECILES)
    middle = (totals >= low) & (totals <= high)
    # Of two rounds none lies between the deciles.
    means = (table[middle] if middle.any() else table).mean(axis=0)
    return {name: float(means[place]) for place, name in enumerate(first.seconds)}
