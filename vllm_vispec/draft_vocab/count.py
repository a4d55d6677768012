"""From answers to a list of tokens, most frequent first, and how much of the answers it covers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from vllm_vispec.data.types import ANSWER_TOKENS_KEY, Conversation

HELD_OUT_EVERY = 10
"""Every tenth answer does not count for the ranking that the held-out coverage is told of."""
SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Numbers of tokens whose coverage is told, as far as the target has as many."""


@dataclass(frozen=True)
class TokenCounts:
    """How often each token occurs in answers.

    Attributes:
        ranked: of nine answers in ten.
        held_out: of the tenth.
        answers: how many were counted.
    """

    ranked: Counter[int]
    held_out: Counter[int]
    answers: int

    @property
    def total(self) -> Counter[int]:
        """Of all answers."""
        return self.ranked + self.held_out


def answer_ids(
    conversation: Conversation, tokenize: Callable[[str], Sequence[int]]
) -> Iterator[Sequence[int]]:
    """Token ids of every assistant turn: the recorded ones, else those of its text."""
    recorded = conversation.extra.get(ANSWER_TOKENS_KEY) or ()
    turns = [turn for turn in conversation.turns if turn.role == "assistant"]
    for index, turn in enumerate(turns):
        ids = recorded[index] if index < len(recorded) else None
        yield tokenize(turn.text) if ids is None else ids


def count_tokens(answers: Iterable[Sequence[int]]) -> TokenCounts:
    """Count the tokens of all answers."""
    ranked: Counter[int] = Counter()
    held_out: Counter[int] = Counter()
    number = 0
    for number, ids in enumerate(answers, start=1):
        (ranked if number % HELD_OUT_EVERY else held_out).update(ids)
    return TokenCounts(ranked, held_out, number)


def rank_tokens(counts: Counter[int], special: Iterable[int], vocab_size: int) -> list[int]:
    """All tokens of the target: special ones, then by frequency, then the unseen by their id.

    In a BPE vocabulary the ids follow the order of the merges, so the unseen tokens that are most
    likely to appear come first.
    """
    seen = sorted(counts, key=lambda token: (-counts[token], token))
    ordered = dict.fromkeys(chain(sorted(special), seen, range(vocab_size)))
    return [token for token in ordered if 0 <= token < vocab_size]


def coverage(counts: Counter[int], token_ids: Iterable[int]) -> float | None:
    """Share of the counted tokens that are in a list; None if nothing was counted."""
    total = sum(counts.values())
    return sum(counts[token] for token in set(token_ids)) / total if total else None


def coverage_by_size(
    counts: TokenCounts, special: Sequence[int], vocab_size: int, size: int
) -> dict[str, dict[str, float | None]]:
    """Coverage of the N most frequent tokens for `SIZES` and `size`: of all answers, and held out.

    The held-out one ranks tokens by the other answers, so it says more about new questions.
    """
    ranking = rank_tokens(counts.total, special, vocab_size)
    others = rank_tokens(counts.ranked, special, vocab_size)
    return {
        str(n): {
            "all": coverage(counts.total, ranking[:n]),
            "held_out": coverage(counts.held_out, others[:n]),
        }
        for n in sorted({*SIZES, size})
        if n <= vocab_size
    }
