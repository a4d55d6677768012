"""Which draft rows a prompt needs: the geometry of compression, without any tensor mathematics.

Terms: prompt tokens 0..L-1; row p pairs hidden state p with the embedding of token p+1. An image
run [a, b) covers prompt tokens a..b-1, hence rows a-1..b-2 (the one-token shift). Of these rows
only the last `num_query_tokens - 1` are kept, filled by the adaptor, at their own positions.

Corners, and what is done here:

* A run with fewer rows than `num_query_tokens - 1` keeps all its rows and fills them with the LAST
  adaptor rows that fit. (The reference lets positions spill into the text before, or fails.)
* A run at the very start has no row for its first token, because row -1 does not exist. As in the
  reference, the adaptor does not see that token either.
* Runs that touch are one run, as in the reference: one adaptor call, one global feature.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_vispec.errors import ViSpecError

Run = tuple[int, int]


@dataclass(frozen=True)
class RowPlan:
    """The compact rows of one prompt; all tuples run over the rows except `runs`.

    Attributes:
        runs: merged image runs [start, end) of tokens that the adaptor reads.
        positions: RoPE position of each row, which is also the index of its hidden state.
        run_of_row: for an image row its run; for a text row the run whose global feature it
            gets, -1 for zeros.
        adaptor_row: which adaptor output row fills it, -1 for a text row.
        length: number of rows before compression (= number of prompt tokens).
        num_query_tokens: adaptor outputs per run.
    """

    runs: tuple[Run, ...]
    positions: tuple[int, ...]
    run_of_row: tuple[int, ...]
    adaptor_row: tuple[int, ...]
    length: int
    num_query_tokens: int

    @property
    def is_image(self) -> tuple[bool, ...]:
        """Whether a row is an adaptor row."""
        return tuple(row >= 0 for row in self.adaptor_row)


def merge_runs(runs: Iterable[Run], length: int) -> list[Run]:
    """Sort runs and merge those that touch.

    Raises:
        ViSpecError: a run is empty, overlaps another, or lies outside the prompt.
    """
    merged: list[Run] = []
    for start, end in sorted(runs):
        if not 0 <= start < end <= length:
            raise ViSpecError(
                f"image run [{start}, {end}) does not lie in a prompt of {length} tokens: give "
                "runs as [start, end) in prompt indices"
            )
        if merged and start < merged[-1][1]:
            raise ViSpecError(
                f"image runs {list(merged[-1])} and {[start, end]} overlap: give disjoint runs"
            )
        if merged and start == merged[-1][1]:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def plan_rows(
    length: int,
    runs: Iterable[Run],
    num_query_tokens: int,
    *,
    compress: bool = True,
) -> RowPlan:
    """Lay out the compact rows of a prompt of `length` tokens.

    Args:
        length: number of prompt tokens L.
        runs: image runs [start, end) in prompt indices.
        num_query_tokens: adaptor outputs per run; the last one is the global feature.
        compress: False keeps every image row as a text row (global features still apply).
    """
    merged = [(max(start, 1), end) for start, end in merge_runs(runs, length) if end > 1]
    positions: list[int] = []
    run_of_row: list[int] = []
    adaptor_row: list[int] = []

    def add_text(first: int, last: int, run: int) -> None:
        positions.extend(range(first, last))
        run_of_row.extend([run] * (last - first))
        adaptor_row.extend([-1] * (last - first))

    done = 0
    for index, (start, end) in enumerate(merged):
        first, last = max(start - 1, 0), end - 1
        if not compress:
            add_text(done, last, index - 1)
            done = last
            continue
        add_text(done, first, index - 1)
        kept = min(num_query_tokens - 1, last - first)
        positions.extend(range(last - kept, last))
        run_of_row.extend([index] * kept)
        adaptor_row.extend(range(num_query_tokens - 1 - kept, num_query_tokens - 1))
        done = last
    add_text(done, length, len(merged) - 1)
    return RowPlan(
        tuple(merged),
        tuple(positions),
        tuple(run_of_row),
        tuple(adaptor_row),
        length,
        num_query_tokens,
    )
