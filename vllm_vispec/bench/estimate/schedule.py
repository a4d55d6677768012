"""A K for every batch size, in the form of vLLM's `num_speculative_tokens_per_batch_size`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    return _ranges(chosen)


def _ranges(chosen: Sequence[tuple[int, int]]) -> Schedule:
    """(batch, K) pairs in order -> merged ranges."""
    merged: Schedule = []
    for index, (batch, k) in enumerate(chosen):
        last = chosen[index + 1][0] - 1 if index + 1 < len(chosen) else batch
        if merged and merged[-1][2] == k:
            merged[-1] = (merged[-1][0], last, k)
        else:
            merged.append((batch if merged else 1, last, k))
    return merged
