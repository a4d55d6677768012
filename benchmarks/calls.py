"""What engines with a draft did beside plain vLLM, call by call, and the numbers of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_vispec.bench.bootstrap import bootstrap
from vllm_vispec.bench.schema import Record


@dataclass(frozen=True)
class Call:
    """Samples answered together by an engine with a draft, beside plain vLLM.

    Attributes:
        families: Of the samples.
        accepted: Accepted draft tokens of every step, for each sample.
        decoded, plain_decoded: Tokens after the first, for each sample.
        identical: Whether the tokens are those of plain decoding; None where they need not be.
        seconds, plain_seconds: From the first token of the call to its last.
        wall_seconds, plain_wall_seconds: Of the whole call.
    """

    families: tuple[str, ...]
    accepted: tuple[tuple[int, ...], ...]
    decoded: tuple[int, ...] = ()
    plain_decoded: tuple[int, ...] = ()
    identical: tuple[bool, ...] | None = None
    seconds: float = 0.0
    plain_seconds: float = 0.0
    wall_seconds: float = 0.0
    plain_wall_seconds: float = 0.0

    @property
    def batch(self) -> int:
        """Requests at a time."""
        return len(self.families)


@dataclass(frozen=True)
class Memory:
    """What a tree takes: percent of the KV cache on top, and buffers in MiB."""

    kv_percent: float
    buffers_mib: float


@dataclass(frozen=True)
class Measured(Record):
    """What was measured with one draft; `memory` is None without a tree."""

    calls: tuple[Call, ...]
    memory: Memory | None = None


Calls = Sequence[Call]
Seeds = Sequence[Calls]
"""Per seed (or repetition), the same calls in the same order."""
Statistic = Callable[[Calls], float]


def _steps(calls: Calls) -> list[int]:
    """Accepted draft tokens of every step."""
    return [count for call in calls for accepted in call.accepted for count in accepted]


def acceptance_length(calls: Calls) -> float:
    """Accepted draft tokens of a step, plus the bonus token."""
    steps = _steps(calls)
    return 1 + sum(steps) / max(len(steps), 1)


def acceptance_rate_per_position(calls: Calls, num_draft_tokens: int) -> list[float]:
    """Share of steps that accepted the draft token at each position."""
    steps = _steps(calls)
    total = max(len(steps), 1)
    return [sum(count > place for count in steps) / total for place in range(num_draft_tokens)]


def tokens_per_second(calls: Calls) -> tuple[float, float]:
    """Tokens after the first per second of decoding, with the draft and of plain vLLM."""
    return (
        _quotient(sum(sum(call.decoded) for call in calls), sum(c.seconds for c in calls)),
        _quotient(
            sum(sum(call.plain_decoded) for call in calls), sum(c.plain_seconds for c in calls)
        ),
    )


def decode_speedup(calls: Calls) -> float:
    """Tokens per second over those of plain vLLM in the same calls, prefill excluded."""
    return _quotient(*tokens_per_second(calls))


def e2e_speedup(calls: Calls) -> float:
    """The same of whole calls, prefill and image preprocessing included."""
    tokens = sum(sum(call.decoded) + call.batch for call in calls)
    plain_tokens = sum(sum(call.plain_decoded) + call.batch for call in calls)
    return _quotient(
        _quotient(tokens, sum(call.wall_seconds for call in calls)),
        _quotient(plain_tokens, sum(call.plain_wall_seconds for call in calls)),
    )


def step_cost(calls: Calls) -> float:
    """Seconds of a step, drafting included, over those of a pass of plain vLLM.

    A batch takes as many passes as its longest answer.
    """
    steps = sum(max(map(len, call.accepted)) for call in calls)
    passes = sum(max(call.plain_decoded) for call in calls)
    return _quotient(
        _quotient(sum(call.seconds for call in calls), steps),
        _quotient(sum(call.plain_seconds for call in calls), passes),
    )


def identical(calls: Calls) -> tuple[int, int] | None:
    """Answers equal to plain vLLM's, and all answers; None where they need not be equal."""
    found = [same for call in calls for same in call.identical or ()]
    return (sum(found), len(found)) if found else None


def _quotient(above: float, below: float) -> float:
    return above / below if below else float("nan")


def estimate(seeds: Seeds, statistic: Statistic) -> dict[str, Any]:
    """Mean over seeds, its 95 % interval over seeds and calls, and the value of every seed."""
    values = [statistic(calls) for calls in seeds]
    low, high = bootstrap(seeds, (0, 1), lambda drawn: _mean_over(drawn, statistic)).tolist()
    return {"mean": _mean_over(seeds, statistic), "low": low, "high": high, "seeds": values}


def ratio(one: Seeds, other: Seeds, statistic: Statistic) -> dict[str, Any]:
    """How many times larger the statistic of `one` is; the same draws on both sides."""

    def ratio_of_means(both: Iterable[Iterable[Calls]]) -> float:
        mine, theirs = (_mean_over(part, statistic) for part in both)
        return mine / theirs

    values = [statistic(a) / statistic(b) for a, b in zip(one, other, strict=True)]
    low, high = bootstrap([one, other], (1, 2), ratio_of_means).tolist()
    return {"mean": ratio_of_means([one, other]), "low": low, "high": high, "seeds": values}


def _mean_over(seeds: Iterable[Calls], statistic: Statistic) -> float:
    values = [statistic(list(calls)) for calls in seeds]
    return sum(values) / len(values)


def shown(found: dict[str, Any] | None) -> str:
    """A mean with its interval, as in tables; nothing for None."""
    return f"{found['mean']:.2f} ({found['low']:.2f}-{found['high']:.2f})" if found else ""
