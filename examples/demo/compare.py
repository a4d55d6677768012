"""Ask two engines the same questions in turns, and sum up what came back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import mean, median

from examples.demo.job import Answer
from examples.demo.side import Side


@dataclass(frozen=True)
class Exchange:
    """All answers to one sample, one per repetition."""

    sample: int
    plain: tuple[Answer, ...]
    vispec: tuple[Answer, ...]

    @property
    def is_identical(self) -> bool:
        """Whether every repetition of both sides gave the same tokens."""
        return len({answer.token_ids for answer in chain(self.plain, self.vispec)}) == 1


@dataclass(frozen=True)
class Summary:
    """Numbers over many exchanges; times in seconds.

    Attributes:
        decode_speedup: Decode time per token of plain vLLM over that of ViSpec, prefill excluded.
        e2e_speedup: The same of the whole calls.
        acceptance_rate_per_position: For each draft position, the share of steps that accepted it.
        output_tokens: Mean length of an answer.
    """

    identical: int
    total: int
    decode_speedup: float
    e2e_speedup: float
    acceptance_length: float
    acceptance_rate_per_position: tuple[float, ...]
    plain_tokens_per_second: float
    vispec_tokens_per_second: float
    plain_ttft: float
    vispec_ttft: float
    output_tokens: float


def run_exchanges(
    plain: Side,
    vispec: Side,
    samples: Sequence[int],
    repetitions: int,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Exchange]:
    """Have both sides answer every sample, taking turns so that drifts hit both alike."""
    sides = {"plain": plain, "vispec": vispec}
    answers: dict[tuple[str, int], list[Answer]] = {}
    for repetition in range(repetitions):
        for sample in samples:
            # Whoever comes second may find warmer caches.
            order = list(sides) if (repetition + sample) % 2 == 0 else list(reversed(sides))
            for name in order:
                answers.setdefault((name, sample), []).append(sides[name].answer(sample))
                on_answer()
    return [
        Exchange(sample, tuple(answers["plain", sample]), tuple(answers["vispec", sample]))
        for sample in samples
    ]


def warm_up(side: Side, samples: Sequence[int]) -> None:
    """Let everything that happens only once happen before the clock runs."""
    for sample in samples:
        side.answer(sample)


def summarise(exchanges: Sequence[Exchange], num_draft_tokens: int) -> Summary:
    """Sum up exchanges."""
    plain = [answer for exchange in exchanges for answer in exchange.plain]
    vispec = [answer for exchange in exchanges for answer in exchange.vispec]
    per_step_accepted = [accepted for answer in vispec for accepted in answer.per_step_accepted]
    return Summary(
        identical=sum(exchange.is_identical for exchange in exchanges),
        total=len(exchanges),
        decode_speedup=tokens_per_second(vispec) / tokens_per_second(plain),
        e2e_speedup=_calls_per_second(vispec) / _calls_per_second(plain),
        acceptance_length=mean(per_step_accepted) + 1 if per_step_accepted else 1.0,
        acceptance_rate_per_position=acceptance_rate_per_position(
            per_step_accepted, num_draft_tokens
        ),
        plain_tokens_per_second=tokens_per_second(plain),
        vispec_tokens_per_second=tokens_per_second(vispec),
        plain_ttft=median(answer.ttft_seconds for answer in plain),
        vispec_ttft=median(answer.ttft_seconds for answer in vispec),
        output_tokens=mean(len(answer.token_ids) for answer in plain),
    )


def acceptance_rate_per_position(
    per_step_accepted: Sequence[int], num_draft_tokens: int
) -> tuple[float, ...]:
    """Return the share of steps that accepted the draft token at each position."""
    total = max(len(per_step_accepted), 1)
    return tuple(
        sum(accepted > position for accepted in per_step_accepted) / total
        for position in range(num_draft_tokens)
    )


def tokens_per_second(answers: Sequence[Answer]) -> float:
    """Return the decode speed, without the first token of each answer and its prefill."""
    seconds = sum(answer.decode_seconds for answer in answers)
    return sum(answer.num_decoded for answer in answers) / seconds if seconds else float("nan")


def _calls_per_second(answers: Sequence[Answer]) -> float:
    tokens = sum(len(answer.token_ids) for answer in answers)
    return tokens / sum(answer.wall_seconds for answer in answers)
