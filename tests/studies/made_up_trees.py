"""Made-up calls, rows and sides for the evidence on trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.trees.grid import CHAIN, LOADED, LONG, TREE, Draft, Part, eagle2
from benchmarks.trees.results import Row, make_row
from benchmarks.turns import Call, Reply


def made_up_call(accepted: int, seconds: float, families: Sequence[str] = ("captioning",)) -> Call:
    """Two rounds for every sample; plain vLLM takes 12 s for 12 tokens."""
    count = len(families)
    return Call(
        families=tuple(families),
        accepted=((accepted, accepted),) * count,
        decoded=(12,) * count,
        plain_decoded=(12,) * count,
        identical=(True,) * count,
        seconds=seconds,
        plain_seconds=12.0,
    )


def made_up_row(part: Part, draft: Draft, accepted: int, seconds: float, batch: int = 1) -> Row:
    """Two calls of a size, all about captioning."""
    calls = [made_up_call(accepted, seconds, ("captioning",) * batch)] * 2
    return make_row(part, draft, calls, None)


def made_up_rows(loaded: float = 4.0, tree_accepted: int = 5) -> list[Row]:
    """The tree of depth 5 is 1.2 times as fast as the chain of 6; batches 1 and 2."""
    policies = [
        made_up_row(Part.POLICIES, Draft(6), 3, 4.8),
        made_up_row(Part.POLICIES, eagle2(5), tree_accepted, 4.0),
        made_up_row(Part.POLICIES, eagle2(3), 1, 6.0),
    ]
    batches = [
        made_up_row(Part.BATCH, LONG, 3, 4.0, 1),
        made_up_row(Part.BATCH, LONG, 3, 4.0, 2),
        made_up_row(Part.BATCH, CHAIN, 3, 6.0, 1),
        made_up_row(Part.BATCH, CHAIN, 3, 3.2, 2),
        made_up_row(Part.BATCH, TREE, 3, 3.0, 1),
        made_up_row(Part.BATCH, TREE, 3, 8.0, 2),
        made_up_row(Part.BATCH, LOADED, 3, 3.0, 1),
        made_up_row(Part.BATCH, LOADED, 3, loaded, 2),
    ]
    return policies + batches


@dataclass
class FakeEngine:
    """Answers with the samples' numbers; a draft's rounds accept one token each."""

    name: str
    asked: list[tuple[tuple[int, ...], float]] = field(default_factory=list)

    def ask(self, samples: Sequence[int], temperature: float = 0.0) -> Reply:
        """Note what was asked."""
        self.asked.append((tuple(samples), temperature))
        ids = tuple((sample, 1, 2) for sample in samples)
        return Reply(ids, ((1,),) * len(ids), 0.5, 1.0)
