"""A two-sample test on token prefixes, and how large a difference it sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.stats import chi2

Prefix = tuple[int, ...]
MIN_EXPECTED = 10
"""Prefixes with fewer expected occurrences per sample are pooled."""
MAX_POOLS = 4
"""Most cells that rare prefixes are spread over, by the sum of their tokens."""


def table(one: Sequence[Prefix], other: Sequence[Prefix]) -> np.ndarray:
    """Return counts [2, cells]: a cell for each frequent prefix, then the pools of the rare ones.

    Which pool a prefix falls into depends on the prefix alone, so two samples of one distribution
    fill the pools alike. Without them long prefixes, nearly all rare, would not be compared.
    """
    total = Counter(one) + Counter(other)
    frequent = [prefix for prefix, count in total.items() if count >= 2 * MIN_EXPECTED]
    cells = {prefix: index for index, prefix in enumerate(frequent)}
    num_rare = total.total() - sum(total[prefix] for prefix in frequent)
    pools = min(max(num_rare // (4 * MIN_EXPECTED), 1), MAX_POOLS)
    counts = np.zeros((2, len(cells) + pools), dtype=int)
    for row, sample in zip(counts, (one, other), strict=True):
        for prefix in sample:
            row[cells.get(prefix, len(cells) + sum(prefix) % pools)] += 1
    return counts


def p_value(counts: np.ndarray) -> float:
    """Return the p-value of the G-test that both rows of [2, cells] have one distribution."""
    counts = counts[:, counts.sum(axis=0) > 0].astype(float)
    expected = counts.sum(axis=0) * counts.sum(axis=1, keepdims=True) / counts.sum()
    ratio = np.where(counts > 0, counts / expected, 1.0)
    statistic = 2 * float((counts * np.log(ratio)).sum())
    return float(chi2.sf(statistic, counts.shape[1] - 1))


def rejection_rate(
    prefixes: Sequence[Prefix], bias: float, alpha: float, repeats: int = 300, seed: int = 0
) -> float:
    """Return how often the test rejects when the second sample comes from a biased sampler.

    Both samples are drawn with replacement from ``prefixes``. The biased sampler replaces the last
    token by the most likely one behind the same tokens with probability ``bias``, which is what a
    verifier does that lets this share of the drafts pass unseen.
    """
    rng, size = np.random.default_rng(seed), len(prefixes)
    favourites = _most_likely(prefixes)
    rejected = 0
    for _ in range(repeats):
        one = [prefixes[i] for i in rng.integers(size, size=size)]
        other = [prefixes[i] for i in rng.integers(size, size=size)]
        forced = rng.random(size) < bias
        other = [
            (*prefix[:-1], favourites[prefix[:-1]]) if force else prefix
            for prefix, force in zip(other, forced, strict=True)
        ]
        rejected += p_value(table(one, other)) < alpha
    return rejected / repeats


def _most_likely(prefixes: Sequence[Prefix]) -> dict[Prefix, int]:
    behind: dict[Prefix, Counter[int]] = {}
    for prefix in prefixes:
        behind.setdefault(prefix[:-1], Counter())[prefix[-1]] += 1
    return {context: count.most_common(1)[0][0] for context, count in behind.items()}
