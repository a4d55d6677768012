"""Whether the goals are met, and where trees lose to chains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.trees.grid import VISPEC, Part
from benchmarks.trees.results import CAPTIONING, Row, Rows

TOKENS_GOAL, SPEEDUP_GOAL, STRETCH_GOAL = 1.25, 3.0, 3.3


@dataclass(frozen=True)
class Goal:
    """A goal and what was found.

    Attributes:
        value: what was measured.
        met: whether the value reaches it.
        found: where, in words.
    """

    text: str
    value: float
    met: bool
    found: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Loss:
    """A place where a tree decodes more slowly than the chain.

    Attributes:
        ratio: decode_speedup of the tree over that of the chain.
    """

    tree: str
    chain: str
    where: str
    ratio: float


def find_goals(rows: Rows) -> list[Goal]:
    """Goals for which there are numbers."""
    goals = [
        _tokens(rows[part], whose)
        for part, whose in ((Part.POLICIES, ""), (Part.DRAFT_VLM, ", draft VLM"))
    ]
    goals += [_captioning(rows, least) for least in (SPEEDUP_GOAL, STRETCH_GOAL)]
    goals += _load(rows[Part.BATCH])
    goals += _load(rows[Part.DRAFT_VLM_BATCH])
    return [goal for goal in goals if goal is not None]


def same_depth(rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """Trees with the chain whose K is the longest path of the tree."""
    chains = {row.draft.nodes: row for row in _chains(rows)}
    for row in rows:
        if row.draft.tree is not None and row.draft.levels in chains:
            yield row, chains[row.draft.levels]


def _tokens(rows: Sequence[Row], whose: str) -> Goal | None:
    pairs = [
        (tree.tokens_per_round.value / chain.tokens_per_round.value, tree, chain)
        for tree, chain in same_depth(rows)
    ]
    if not pairs:
        return None
    ratio, tree, chain = max(pairs, key=lambda pair: pair[0])
    # Nothing a tree of this depth does can reach more.
    most = (tree.draft.levels + 1) / chain.tokens_per_round.value
    return Goal(
        f"tokens_per_round of a tree >= {TOKENS_GOAL} x the chain's at the same depth, "
        f"best tree{whose}",
        ratio,
        ratio >= TOKENS_GOAL,
        f"{tree.draft.label}: {tree.tokens_per_round.value:.2f}, {chain.draft.label}: "
        f"{chain.tokens_per_round.value:.2f}; with every draft token accepted {most:.2f}",
    )


def _captioning(rows: Rows, least: float) -> Goal | None:
    found = [
        (speedup, row)
        for part in (Part.POLICIES, Part.NODES)
        for row in rows[part]
        if row.draft.has_branches and row.draft.head == VISPEC
        if (speedup := row.speedup_in(CAPTIONING)) is not None
    ]
    if not found:
        return None
    speedup, row = max(found, key=lambda pair: pair[0])
    text = f"decode_speedup > {least} over plain vLLM on {CAPTIONING}, batch 1, best branching tree"
    return Goal(text, speedup, speedup > least, row.draft.label)


def _load(rows: Sequence[Row]) -> Iterator[Goal]:
    """For every tree with a schedule: against the chain as deep, and against the fastest one."""
    for draft in dict.fromkeys(row.draft for row in rows if row.draft.schedule):
        mine = {row.batch: row for row in rows if row.draft == draft}
        deep = {row.batch: row for row in _chains(rows) if row.draft.nodes == draft.levels}
        ratios = {batch: _ratio(mine[batch], deep[batch]) for batch in mine if batch in deep}
        if not ratios:
            continue
        fastest = {batch: _ratio(mine[batch], _fastest_at(rows, batch)) for batch in ratios}
        yield Goal(
            "decode_speedup with a load schedule >= the chain's as deep at every batch size: "
            f"{draft.label}",
            min(ratios.values()),
            min(ratios.values()) >= 1,
            f"{_by_batch(ratios)}; over the fastest chain measured there: {_by_batch(fastest)}",
        )


def _by_batch(ratios: Mapping[int, float]) -> str:
    return ", ".join(f"batch {batch}: {ratio:.2f}" for batch, ratio in sorted(ratios.items()))


def _chains(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.draft.tree is None]


def _fastest(chains: Iterable[Row]) -> Row:
    return max(chains, key=lambda row: row.decode_speedup.value)


def _fastest_at(rows: Sequence[Row], batch: int) -> Row:
    return _fastest(row for row in _chains(rows) if row.batch == batch)


def _ratio(row: Row, other: Row) -> float:
    return row.decode_speedup.value / other.decode_speedup.value


def find_losses(rows: Rows) -> list[Loss]:
    """Where trees are slower than the fastest chain: by family at batch 1, and by batch size."""
    return [
        *_lost_families(rows[Part.POLICIES]),
        *_lost_batches(rows[Part.BATCH]),
        *_lost_batches(rows[Part.DRAFT_VLM_BATCH]),
    ]


def _lost_families(rows: Sequence[Row]) -> Iterator[Loss]:
    chains = _chains(rows)
    for tree in (row for row in rows if row.draft.tree is not None and chains):
        best = _fastest(chains)
        ratios = {
            family: speedup / best.by_family[family][1]
            for family, (_, speedup) in tree.by_family.items()
            if family in best.by_family
        }
        lost = {family: ratio for family, ratio in ratios.items() if ratio < 1}
        if lost:
            where = ", ".join(f"{family} {ratio:.2f}" for family, ratio in lost.items())
            overall = tree.decode_speedup.value / best.decode_speedup.value
            yield Loss(tree.draft.label, best.draft.label, where, overall)


def _lost_batches(rows: Sequence[Row]) -> Iterator[Loss]:
    measured = {row.batch for row in _chains(rows)}
    for tree in rows:
        if tree.draft.tree is None or tree.batch not in measured:
            continue
        chain = _fastest_at(rows, tree.batch)
        ratio = _ratio(tree, chain)
        if ratio < 1:
            yield Loss(tree.draft.label, chain.draft.label, f"batch {tree.batch}", ratio)
