"""A K for every batch size, in the form of vLLM's `num_speculative_tokens_per_batch_size`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

Schedule = list[tuple[int, int, int]]
"""(first batch size, last batch size, K), in order; the first begins at 1. K = 0 drafts nothing."""


def best_schedule(speedups: Mapping[int, Mapping[int, float]]) -> Schedule:
    """Choose the fastest K for every batch size, 0 where none is faster than plain.

    Of two equally fast K the smaller one is chosen.

    Args:
        speedups: batch size -> K -> decode_speedup, measured or estimated.
    """
    best = [
        (batch, max(sorted(found), key=found.__getitem__))
        for batch, found in sorted(speedups.items())
        if found
    ]
    return merged_ranges([(batch, k if speedups[batch][k] > 1 else 0) for batch, k in best])


def merged_ranges(chosen: Sequence[tuple[int, int]], midway: bool = False) -> Schedule:
    """Turn the K of single batch sizes into ranges, neighbours with the same K into one.

    A range reaches up to the next batch size; behind the last one vLLM goes on with the last K.

    Args:
        chosen: (batch size, K) in order.
        midway: let a range end midway to the next batch size (geometrically) instead of just
            below it: under a load of 8 some steps run 7 requests, which should not count as 4.
    """
    merged: Schedule = []
    for index, (batch, k) in enumerate(chosen):
        last = batch
        if index + 1 < len(chosen):
            following = chosen[index + 1][0]
            border = max(batch + 1, round(sqrt(batch * following))) if midway else following
            last = border - 1
        if merged and merged[-1][2] == k:
            merged[-1] = (merged[-1][0], last, k)
        else:
            merged.append((merged[-1][1] + 1 if merged else 1, last, k))
    return merged
