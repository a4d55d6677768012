"""A K for every batch size, in the form of vLLM's `num_speculative_tokens_per_batch_size`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

Schedule = list[tuple[int, int, int]]
"""(first batch size, last batch size, K), in order; the first begins at 1. K = 0 drafts nothing."""


def best_schedule(speedups: Mapping[int, Mapping[int, float]]) -> Schedule:
    """Choose the fastest K for every batch size, 0 where none is faster than plain.

    A range reaches up to the next batch size that is known; behind the last one vLLM goes on with
    the last K. Of two equally fast K the smaller one is chosen.

    Args:
        speedups: batch size -> K -> decode_speedup, measured or estimated.
    """
    chosen = []
    for batch in sorted(speedups):
        found = speedups[batch]
        if not found:
            continue
        k = max(sorted(found), key=lambda one: found[one])
        chosen.append((batch, k if found[k] > 1 else 0))
    return merged_ranges(chosen)


def merged_ranges(chosen: Sequence[tuple[int, int]], midway: bool = False) -> Schedule:
    """Turn the K of single batch sizes into ranges, neighbours with the same K into one.

    Args:
        chosen: (batch size, K) in order.
        midway: let a range end midway to the next batch size (geometrically) instead of just
            below it: under a load of 8 some steps run 7 requests, which should not count as 4.
    """
    merged: Schedule = []
    for index, (batch, k) in enumerate(chosen):
        last = batch
        if index + 1 < len(chosen):
            last = _border(batch, chosen[index + 1][0], midway) - 1
        first = merged[-1][1] + 1 if merged else 1
        if merged and merged[-1][2] == k:
            merged[-1] = (merged[-1][0], last, k)
        else:
            merged.append((first, last, k))
    return merged


def _border(batch: int, following: int, midway: bool) -> int:
    """Return the first batch size that takes the next K."""
    return max(batch + 1, round(sqrt(batch * following))) if midway else following
