"""Means over seeds, and intervals over seeds and questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from benchmarks.ablation.measure import Asked
from vllm_vispec.bench.bootstrap import bootstrap


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
    """Mean over seeds with a 95 % interval over seeds and questions."""
    values = tuple(statistic(asked) for asked in seeds)
    low, high = bootstrap(seeds, (0, 1), lambda drawn: mean_over(drawn, statistic)).tolist()
    return Estimate(mean_over(seeds, statistic), low, high, values)


def ratio(one: Seeds[Question], other: Seeds[Question], statistic: Statistic[Question]) -> Estimate:
    """How many times larger the statistic of `one` is; the same draws on both sides."""
    values = tuple(statistic(a) / statistic(b) for a, b in zip(one, other, strict=True))

    def ratio_of_means(sides: Iterable[Iterable[Iterable[Question]]]) -> float:
        mine, theirs = (mean_over(side, statistic) for side in sides)
        return mine / theirs

    low, high = bootstrap([one, other], (1, 2), ratio_of_means).tolist()
    return Estimate(ratio_of_means([one, other]), low, high, values)


def mean_over(seeds: Iterable[Iterable[Question]], statistic: Statistic[Question]) -> float:
    """Mean of a statistic over seeds."""
    values = [statistic(list(asked)) for asked in seeds]
    return sum(values) / len(values)
