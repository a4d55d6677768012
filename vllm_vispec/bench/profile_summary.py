"""Medians, deciles and ratios of the parts of a step, with intervals: the content of profile.json.

Arrays: R steps, C columns (parts, then wholes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_vispec.bench.bootstrap import RESAMPLES, Numbers, bootstrap
from vllm_vispec.bench.profile_steps import Step
from vllm_vispec.bench.schema import Record

EAGLE, VISPEC = "eagle", "vispec"
SIDES = (EAGLE, VISPEC)
DECILES = (0.1, 0.9)

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Block:
    """The steps of one group of questions in one repetition, as many on both sides.

    Attributes:
        eagle, vispec: the first of one are the counterparts of the first of the other.
    """

    eagle: tuple[Step, ...]
    vispec: tuple[Step, ...]

    def select(self, keep: Callable[[Step], bool]) -> Block:
        """Return the block of some of its steps."""
        return Block(tuple(filter(keep, self.eagle)), tuple(filter(keep, self.vispec)))


@dataclass(frozen=True)
class Figures(Record):
    """Seconds of one side: the median, its 95 % interval if there is one, and the first decile.

    The first decile is what something costs while nothing else disturbs the machine.
    """

    median: float
    interval_95: Interval
    first_decile: float


@dataclass(frozen=True)
class Comparison(Record):
    """A part on both sides. Ratios are ViSpec's over EAGLE's; None where EAGLE has no such part."""

    eagle: Figures
    vispec: Figures
    ratio: float | None
    ratio_interval_95: Interval
    ratio_first_decile: float | None


@dataclass(frozen=True)
class Summary(Record):
    """One kind of step.

    Attributes:
        rounds: how many steps on each side.
        parts, wholes: by name.
        typical: for each side, mean seconds by part over the steps whose time lies between the
            first and the last decile. Unlike medians these add up to a step.
    """

    rounds: int
    parts: dict[str, Comparison]
    wholes: dict[str, Comparison]
    typical: dict[str, dict[str, float]]


@dataclass(frozen=True)
class ImageTokens(Record):
    """Prefills over so many image tokens of so many requests together."""

    image_tokens: int
    requests: int
    summary: Summary


@dataclass(frozen=True)
class Profile(Record):
    """Where a step's time goes, on both sides.

    Attributes:
        format: `FORMAT` of the version that wrote it.
        machine: see `describe_machine`.
        settings: see `ProfileSettings`.
        command: what a user types to measure this again.
        notes: what has to be known to read the numbers.
        left_out: steps that are not among these, by side and reason.
        rounds: steps by kind, decode and prefill.
        prefill_by_image_tokens: prefills apart, fewest image tokens first.
    """

    format: int
    machine: dict[str, Any]
    settings: dict[str, Any]
    command: str
    notes: tuple[str, ...]
    left_out: dict[str, dict[str, int]]
    rounds: dict[str, Summary]
    prefill_by_image_tokens: tuple[ImageTokens, ...]


def summarise(blocks: Sequence[Block], resamples: int = RESAMPLES, seed: int = 0) -> Summary:
    """Compare the steps of blocks, all of one kind and split alike.

    A resample of an interval draws blocks with replacement, the same for both sides: it answers how
    different a number might be for other questions of the kind or at another minute of the run.

    Args:
        blocks: at least one with a step.
    """
    blocks = [block for block in blocks if block.eagle]
    first = blocks[0].eagle[0]
    tables = np.empty((len(SIDES), len(blocks)), dtype=object)
    for number, block in enumerate(blocks):
        tables[0, number], tables[1, number] = _table(block.eagle), _table(block.vispec)
    pooled_RC = [np.concatenate(list(side)) for side in tables]
    names = [*first.seconds, *first.wholes]
    # One block says nothing about how blocks differ: no interval.
    ends = np.full((2, len(SIDES) + 1, len(names)), np.nan)
    if len(blocks) > 1:
        ends = bootstrap(tables, (1,), _medians_and_ratio, resamples, seed)
    medians, deciles = _medians_and_ratio(tables), [np.quantile(x, 0.1, axis=0) for x in pooled_RC]
    decile_ratio = _divide(deciles[1], deciles[0])

    def figures(side: int, place: int) -> Figures:
        interval = _interval(ends[:, side, place])
        return Figures(float(medians[side][place]), interval, float(deciles[side][place]))

    def compared(place: int) -> Comparison:
        return Comparison(
            figures(0, place),
            figures(1, place),
            _number(medians[2][place]),
            _interval(ends[:, 2, place]),
            _number(decile_ratio[place]),
        )

    comparisons = {name: compared(place) for place, name in enumerate(names)}
    round_column = names.index("round")
    return Summary(
        rounds=len(pooled_RC[0]),
        parts={name: comparisons[name] for name in first.seconds},
        wholes={name: comparisons[name] for name in first.wholes},
        typical={
            side: dict(zip(first.seconds, _typical(table, round_column), strict=False))
            for side, table in zip(SIDES, pooled_RC, strict=True)
        },
    )


def by_image_tokens(blocks: Sequence[Block]) -> tuple[ImageTokens, ...]:
    """Split prefills by their number of image tokens and of requests."""
    keys = sorted({(one.image_tokens, one.requests) for block in blocks for one in block.eagle})
    return tuple(
        ImageTokens(
            *key,
            summarise([x.select(lambda s: (s.image_tokens, s.requests) == key) for x in blocks]),  # noqa: B023
        )
        for key in keys
    )


def _table(steps: Sequence[Step]) -> Numbers:
    """Return seconds, ``[R, C]``."""
    return np.array([[*one.seconds.values(), *one.wholes.values()] for one in steps])


def _medians_and_ratio(drawn: NDArray[Any]) -> Numbers:
    """Return EAGLE's medians, ViSpec's, and their ratio (NaN where EAGLE has none), ``[3, C]``."""
    eagle, vispec = (np.median(np.concatenate(list(side)), axis=0) for side in drawn)
    return np.stack([eagle, vispec, _divide(vispec, eagle)])


def _divide(above: Numbers, below: Numbers) -> Numbers:
    return np.divide(above, below, out=np.full_like(below, np.nan), where=below > 0)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _interval(ends: Numbers) -> Interval:
    """Return the ends as numbers; a NaN in a resample made both of them NaN."""
    low, high = ends.tolist()
    return None if np.isnan(low) else (low, high)


def _typical(table_RC: Numbers, round_column: int) -> list[float]:
    totals = table_RC[:, round_column]
    low, high = np.quantile(totals, DECILES)
    middle = (totals >= low) & (totals <= high)
    # Of two steps none lies between the deciles.
    found: list[float] = (table_RC[middle] if middle.any() else table_RC).mean(axis=0).tolist()
    return found
