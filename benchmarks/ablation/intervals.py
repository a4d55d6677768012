"""Means over seeds, and intervals over seeds and questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol, TypeVar

from benchmarks.ablation.measure import Asked

RESAMPLES = 1000


class Accepted(Protocol):
    """A question with the accepted draft tokens of every round of its answer."""

    @property
    def accepted(self) -> tuple[int, ...]:
        """See above."""


Question = TypeVar("Question", bound=Accepted)
Seeds = Sequence[Sequence[Question]]  # per seed, the same questions in the same order
Statistic = Callable[[Sequence[Question]], float]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, its 95 % interval, and the value of every seed."""

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f}-{self.high:.2f})"


def tokens_per_round(asked: Sequence[Accepted]) -> float:
    """Accepted draft tokens per round, plus one."""
    rounds = sum(len(one.accepted) for one in asked)
    return 1 + sum(sum(one.accepted) for one in asked) / max(rounds, 1)


def decode_speedup(asked: Sequence[Asked]) -> float:
    """Decode time of plain vLLM over that with the head, on the timed questions."""
    plain = sum(one.plain_seconds or 0.0 for one in asked)
    draft = sum(one.draft_seconds or 0.0 for one in asked)
    return plain / draft if draft else float("nan")


def estimate(seeds: Seeds[Question], statistic: Statistic[Question]) -> Estimate:
    """Mean over seeds with a 95 % bootstrap interval: seeds are drawn, then questions."""
    values = tuple(statistic(asked) for asked in seeds)
    low, high = interval(lambda pick: mean_over(seeds, pick, statistic), seeds)
    return Estimate(sum(values) / len(values), low, high, values)


def ratio(one: Seeds[Question], other: Seeds[Question], statistic: Statistic[Question]) -> Estimate:
    """How many times larger the statistic of `one` is; the same draws on both sides."""
    values = tuple(statistic(a) / statistic(b) for a, b in zip(one, other, strict=True))
    mean = mean_over(one, None, statistic) / mean_over(other, None, statistic)
    low, high = interval(
        lambda pick: mean_over(one, pick, statistic) / mean_over(other, pick, statistic), one
    )
    return Estimate(mean, low, high, values)


@dataclass(frozen=True)
class Pick:
    """Drawn seeds and drawn questions, by index."""

    seeds: tuple[int, ...]
    questions: tuple[int, ...]


def mean_over(seeds: Seeds[Question], pick: Pick | None, statistic: Statistic[Question]) -> float:
    """Mean of a statistic over (drawn) seeds on (drawn) questions."""
    if pick is None:
        pick = Pick(tuple(range(len(seeds))), tuple(range(len(seeds[0]))))
    values = [statistic([seeds[s][q] for q in pick.questions]) for s in pick.seeds]
    return sum(values) / len(values)


def interval(value: Callable[[Pick], float], seeds: Sequence[Sequence[Any]]) -> tuple[float, float]:
    """95 % bootstrap interval of a value over seeds and questions."""
    random, count, asked = Random(0), len(seeds), len(seeds[0])
    found = sorted(
        value(
            Pick(
                tuple(random.choices(range(count), k=count)),
                tuple(random.choices(range(asked), k=asked)),
            )
        )
        for _ in range(RESAMPLES)
    )
    return found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES)]
