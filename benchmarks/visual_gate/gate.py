"""What attention to the image says of a round, and what a gate on it would cost.

A gate closes a round: nothing is drafted, and the target makes one token in a plain pass of cost 1.
An open round costs `round_cost` such passes and makes accepted_draft + 1 tokens. After a closed
round the next one begins one token on, where the recorded drafts say what it would accept: so the
sums below are what an engine would do on these answers, not an estimate from means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import bootstrap_interval
from benchmarks.visual_gate.watch import Sample, Turn

# The paper's rule: no drafts where the mean over heads is at least this.
VISKIP_THRESHOLD = 0.35
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
TOPS = (0.1, 0.2)
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Gate:
    """Closes rounds whose score is at least (`high`) or at most the threshold."""

    layer: int
    row: str
    threshold: float
    high: bool = True

    def closed(self, turn: Turn) -> list[bool]:
        """For every place of a turn."""
        scores = turn.scores(self.layer, self.row)
        found = scores >= self.threshold if self.high else scores <= self.threshold
        return list(found.tolist())


@dataclass(frozen=True)
class Counts:
    """Rounds of some answers, and the tokens behind their first ones."""

    open: int
    closed: int
    tokens: int

    def cost_per_token(self, round_cost: float) -> float:
        """In plain passes of the target."""
        return (self.open * round_cost + self.closed) / max(self.tokens, 1)

    def break_even(self, ungated: Counts) -> float | None:
        """The round cost above which this gate is cheaper than none; None: at no cost."""
        saved = ungated.open - self.open
        return self.closed / saved if saved > 0 else None


def rounds_of(accepted: Sequence[int], closed: Sequence[bool] | None = None) -> list[int]:
    """The places where rounds begin."""
    found, place = [], 0
    while place < len(accepted):
        found.append(place)
        place += 1 if closed is not None and closed[place] else accepted[place] + 1
    return found


def count(turns: Iterable[Turn], closes: Callable[[Turn], list[bool]] | None = None) -> Counts:
    """Rounds of turns under a gate; None: all open."""
    opened, shut, tokens = 0, 0, 0
    for turn in turns:
        closed = [False] * len(turn.accepted) if closes is None else closes(turn)
        states = [closed[place] for place in rounds_of(turn.accepted, closed)]
        shut += sum(states)
        opened += len(states) - sum(states)
        tokens += len(turn.accepted)
    return Counts(opened, shut, tokens)


def accepted_in_all(samples: Iterable[Sample]) -> int:
    """Accepted drafts of all rounds without a gate."""
    return sum(
        turn.accepted[place]
        for sample in samples
        for turn in sample
        for place in rounds_of(turn.accepted)
    )


def oracle(turn: Turn, round_cost: float) -> list[bool]:
    """Where the cheapest gate of all would close, one that knows what every round will accept."""
    size = len(turn.accepted)
    costs, closed = [0.0] * (size + 1), [False] * size
    for place in reversed(range(size)):
        drafting = round_cost + costs[min(place + turn.accepted[place] + 1, size)]
        plain = 1 + costs[place + 1]
        costs[place], closed[place] = min(drafting, plain), plain < drafting
    return closed


def spearman(scored: NDArray[Any]) -> float:
    """Rank correlation of two rows, ties at their mean rank; 0 where one does not vary."""
    return _correlation([_moments(ranks(scored))])


def ranks(scored: NDArray[Any]) -> NDArray[np.float64]:
    """Each row's values by rank, from 0, less the mean rank; ties at their mean."""
    return np.stack([_ranks(row) - (len(row) - 1) / 2 for row in scored])


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[places]


def _moments(ranked: NDArray[np.float64]) -> NDArray[np.float64]:
    one, other = ranked
    sums = (len(one), one.sum(), other.sum(), one @ one, other @ other, one @ other)
    return np.array(sums, dtype=float)


def _correlation(moments: Sequence[NDArray[np.float64]]) -> float:
    count, x, y, xx, yy, xy = np.sum(moments, axis=0)
    scale = np.sqrt(max(count * xx - x * x, 0.0) * max(count * yy - y * y, 0.0))
    return float((count * xy - x * y) / scale) if scale else 0.0


def spearman_interval(parts: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """95 % bootstrap interval over samples; ranks are those among all rounds, drawn or not."""
    ends = np.cumsum([part.shape[1] for part in parts])[:-1]
    ranked = ranks(np.concatenate(parts, axis=1))
    moments = [_moments(part) for part in np.split(ranked, ends, axis=1)]
    return bootstrap_interval(moments, _correlation)


def scored_rounds(sample: Sample, layer: int, row: str, most: int) -> NDArray[np.float64]:
    """Score and accepted_draft [2, rounds] of ungated rounds.

    Rounds that the answer's end leaves less than `most` drafts are left out: they accept few
    whatever the image says.
    """
    found = [
        (turn.scores(layer, row)[place], turn.accepted[place])
        for turn in sample
        for place in rounds_of(turn.accepted)
        if len(turn.accepted) - place >= most
    ]
    return np.array(found, dtype=float).reshape(-1, 2).T


def correlation(samples: Sequence[Sample], layer: int, row: str, most: int) -> dict[str, Any]:
    """How r goes with accepted_draft: pooled with its interval, by family, and at its top."""
    parts = [scored_rounds(sample, layer, row, most) for sample in samples]
    pooled = np.concatenate(parts, axis=1)
    low, high = spearman_interval(parts)
    families: dict[str, list[NDArray[np.float64]]] = {}
    for sample, part in zip(samples, parts, strict=True):
        families.setdefault(sample[0].family, []).append(part)
    return {
        "layer": layer,
        "row": row,
        "mean_r": float(pooled[0].mean()),
        "spearman": spearman(pooled),
        "spearman_interval_95": [low, high],
        "by_family": {
            name: spearman(np.concatenate(some, axis=1)) for name, some in sorted(families.items())
        },
        "accepted_draft_at_top": [at_top(pooled, share) for share in TOPS],
    }


def at_top(scored: NDArray[np.float64], share: float) -> dict[str, float]:
    """Mean accepted_draft of the rounds with the highest r, and of all others."""
    order = np.argsort(-scored[0], kind="stable")
    accepted = scored[1][order]
    cut = max(round(share * len(accepted)), 1)
    return {
        "share": share,
        "top": float(accepted[:cut].mean()),
        "rest": float(accepted[cut:].mean()),
    }


def gates_at(samples: Sequence[Sample], layer: int, row: str) -> list[Gate]:
    """Gates at the quantiles of r in ungated rounds, closing above and closing below."""
    scores = np.concatenate([scored_rounds(one, layer, row, 1)[0] for one in samples])
    return [
        Gate(layer, row, float(np.quantile(scores, 1 - share if high else share)), high)
        for share in SHARES
        for high in (True, False)
    ]


def cheapest(found: Mapping[Kind, Counts], round_cost: float) -> Kind:
    """Which of some gates costs least per token."""
    return min(found, key=lambda one: found[one].cost_per_token(round_cost))


def gate_json(gate: Gate, counts: Counts, ungated: Counts, round_cost: float) -> dict[str, Any]:
    """A gate and its costs as plain data."""
    cost = counts.cost_per_token(round_cost)
    return {
        "layer": gate.layer,
        "row": gate.row,
        "closes": "above" if gate.high else "below",
        "threshold": gate.threshold,
        "rounds_closed": counts.closed / (counts.open + counts.closed),
        "cost_per_token": cost,
        "cost_over_no_gate": cost / ungated.cost_per_token(round_cost),
        "break_even_round_cost": counts.break_even(ungated),
    }
