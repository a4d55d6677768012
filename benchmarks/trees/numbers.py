"""What calls say in numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.trees.measure import Call
from vllm_vispec.bench.bootstrap import bootstrap

Statistic = Callable[[Sequence[Call]], float]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % bootstrap interval over calls."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"


def estimate(calls: Sequence[Call], statistic: Statistic) -> Estimate:
    """A statistic with its interval."""
    low, high = bootstrap(calls, (0,), lambda drawn: statistic(list(drawn))).tolist()
    return Estimate(statistic(calls), low, high)


def tokens_per_round(calls: Sequence[Call]) -> float:
    """Accepted draft tokens per round, plus one."""
    rounds = [count for call in calls for accepted in call.accepted for count in accepted]
    return 1 + sum(rounds) / max(len(rounds), 1)


def decode_speedup(calls: Sequence[Call]) -> float:
    """Tokens per second over those of plain vLLM in the same calls, prefill excluded."""
    seconds = sum(call.seconds for call in calls)
    plain_seconds = sum(call.plain_seconds for call in calls)
    tokens = sum(sum(call.decoded) for call in calls)
    plain_tokens = sum(sum(call.plain_decoded) for call in calls)
    if not seconds or not plain_tokens:
        return float("nan")
    return (tokens / seconds) / (plain_tokens / plain_seconds)


def round_cost(calls: Sequence[Call]) -> float:
    """Seconds of a round, drafting included, over those of a pass of plain vLLM.

    A batch takes as many passes as its longest answer.
    """
    rounds = sum(max(len(accepted) for accepted in call.accepted) for call in calls)
    passes = sum(max(call.plain_decoded) for call in calls)
    if not rounds or not passes:
        return float("nan")
    seconds = sum(call.seconds for call in calls) / rounds
    return seconds / (sum(call.plain_seconds for call in calls) / passes)


def identical(calls: Sequence[Call]) -> tuple[int, int] | None:
    """Answers equal to plain vLLM's, and all answers; None where they need not be equal."""
    found = [same for call in calls for same in call.identical or ()]
    return (sum(found), len(found)) if found else None


def of_family(calls: Sequence[Call], family: str) -> list[Call]:
    """Calls about one family alone."""
    return [call for call in calls if set(call.families) == {family}]
