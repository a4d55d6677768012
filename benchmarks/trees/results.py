"""Rows of the tables: a draft under a condition and at a batch size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.trees.grid import PARTS, Condition, Draft, Part
from benchmarks.trees.measure import Bench, Call, Measured
from benchmarks.trees.numbers import (
    Estimate,
    decode_speedup,
    estimate,
    identical,
    of_family,
    round_cost,
    tokens_per_round,
)
from benchmarks.trees.sides import Memory

CAPTIONING = "captioning"


@dataclass(frozen=True)
class Row:
    """What a draft did at one batch size.

    Attributes:
        round_cost: see `numbers.round_cost`.
        by_family: tokens_per_round and decode_speedup of families that were asked alone.
        identical: see `numbers.identical`.
    """

    part: Part
    draft: Draft
    condition: Condition
    batch: int
    tokens_per_round: Estimate
    decode_speedup: Estimate
    round_cost: float
    by_family: Mapping[str, tuple[float, float]]
    identical: tuple[int, int] | None
    memory: Memory | None

    def speedup_in(self, family: str) -> float | None:
        """decode_speedup in a family, None if it was not asked alone."""
        found = self.by_family.get(family)
        return None if found is None else found[1]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "part": self.part.value,
            **self.draft.to_json(),
            "temperature": self.condition.temperature,
            "batch": self.batch,
            "tokens_per_round": asdict(self.tokens_per_round),
            "decode_speedup": asdict(self.decode_speedup),
            "round_cost_over_plain_pass": self.round_cost,
            "by_family": {
                name: {"tokens_per_round": tokens, "decode_speedup": speedup}
                for name, (tokens, speedup) in self.by_family.items()
            },
            "identical": self.identical,
            "memory": asdict(self.memory) if self.memory else None,
        }


Rows = Mapping[Part, Sequence[Row]]


def read_rows(bench: Bench) -> dict[Part, list[Row]]:
    """Rows of every part, as far as it was measured."""
    return {part: list(_rows_of(bench, part)) for part in PARTS}


def _rows_of(bench: Bench, part: Part) -> Iterable[Row]:
    case = PARTS[part]
    for draft in case.drafts:
        file = bench.file(case.condition, draft)
        if not file.is_file():
            continue
        measured = Measured.read(file)
        for batch in sorted({call.batch for call in measured.calls}):
            calls = [call for call in measured.calls if call.batch == batch]
            yield make_row(part, draft, calls, measured.memory)


def make_row(part: Part, draft: Draft, calls: Sequence[Call], memory: Memory | None) -> Row:
    """Sum up calls of one size."""
    families = sorted({family for call in calls for family in call.families})
    alone = {family: found for family in families if (found := of_family(calls, family))}
    return Row(
        part,
        draft,
        PARTS[part].condition,
        calls[0].batch,
        estimate(calls, tokens_per_round),
        estimate(calls, decode_speedup),
        round_cost(calls),
        {name: (tokens_per_round(some), decode_speedup(some)) for name, some in alone.items()},
        identical(calls),
        memory,
    )
