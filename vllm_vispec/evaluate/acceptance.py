"""`Acceptance`: what verification rounds accepted, simulated or measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Acceptance:
    """Sums over the rounds of some answers.

    Attributes:
        rounds: verification rounds.
        tokens: answer tokens that rounds produced; the first of an answer comes out of the
            prefill and does not count. A round whose drafts reach the end of the answer produces
            no token of the target's own, so this may be less than accepted + rounds.
        accepted_by_position: rounds that accepted the draft token at each position (K of them).
        answers: answers (one per assistant turn).
    """

    rounds: int
    tokens: int
    accepted_by_position: tuple[int, ...]
    answers: int = 0

    @classmethod
    def of_rounds(
        cls, accepted: Sequence[int], num_tokens: int, num_draft_tokens: int
    ) -> Acceptance:
        """One answer.

        Args:
            accepted: accepted draft tokens of every round, in order.
            num_tokens: tokens of the answer, its first and its last included.
            num_draft_tokens: K.
        """
        by_position = tuple(
            sum(count > position for count in accepted) for position in range(num_draft_tokens)
        )
        return cls(len(accepted), max(num_tokens - 1, 0), by_position, 1)

    @classmethod
    def nothing(cls, num_draft_tokens: int) -> Acceptance:
        """No answer yet."""
        return cls(0, 0, (0,) * num_draft_tokens)

    @property
    def accepted(self) -> int:
        """Accepted draft tokens of all rounds."""
        return sum(self.accepted_by_position)

    @property
    def accepted_draft(self) -> float:
        """Accepted draft tokens per round, 0 without rounds."""
        return self.accepted / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_round(self) -> float:
        """accepted_draft + 1; 1 without rounds."""
        return self.accepted_draft + 1

    @property
    def accept_rates(self) -> tuple[float, ...]:
        """Share of rounds that accepted the draft token at each position."""
        return tuple(count / max(self.rounds, 1) for count in self.accepted_by_position)

    def merge(self, other: Acceptance) -> Acceptance:
        """Sums of both; the shorter chain counts as having accepted nothing further on."""
        depth = max(len(self.accepted_by_position), len(other.accepted_by_position))
        mine, theirs = (
            one.accepted_by_position + (0,) * (depth - len(one.accepted_by_position))
            for one in (self, other)
        )
        return Acceptance(
            self.rounds + other.rounds,
            self.tokens + other.tokens,
            tuple(a + b for a, b in zip(mine, theirs, strict=True)),
            self.answers + other.answers,
        )

    def to_json(self) -> dict[str, Any]:
        """Sums and rates as plain data."""
        return {
            "answers": self.answers,
            "rounds": self.rounds,
            "tokens": self.tokens,
            "tokens_per_round": round(self.tokens_per_round, 4),
            "accepted_draft": round(self.accepted_draft, 4),
            "accept_rates": [round(rate, 4) for rate in self.accept_rates],
            "accepted_by_position": list(self.accepted_by_position),
        }


Families = dict[str, Acceptance]
OVERALL = "overall"


def merge_families(*parts: Families) -> Families:
    """Merge family by family; "overall" comes last."""
    merged: Families = {}
    for part in parts:
        for name, acceptance in part.items():
            merged[name] = merged[name].merge(acceptance) if name in merged else acceptance
    return dict(sorted(merged.items(), key=lambda item: (item[0] == OVERALL, item[0])))
