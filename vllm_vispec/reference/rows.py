"""Which draft rows a prompt needs: the geometry of compression, without any tensor mathematics.

Terms: prompt tokens 0..L-1; row p pairs hidden state p with the embedding of token p+1. An image
[a, b) covers prompt tokens a..b-1, hence rows a-1..b-2. Of these rows only those that hold a token
of the compressor are kept, at their own positions: `compressors.places` says which. ViSpec's
adaptor fills the last `num_query_tokens - 1` (sections 4.1 to 4.3, 4.7 and 4.8 of
docs/reference-semantics.md).

Corner cases:

* An image with fewer rows than a compressor has tokens keeps all its rows; with ViSpec's adaptor
  they hold the LAST adaptor rows. (The reference lets positions spill into the text before, or
  fails.)
* An image at the very start has no row for its first token, because row -1 does not exist. As in
  the reference, the draft does not see that token either.
* Images that touch are one run, as in the reference: one adaptor call, one global feature. Other
  compressors than the adaptor take every image by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from vllm_vispec.compressors.places import place_tokens
from vllm_vispec.compressors.spec import QUERY, CompressorSpec
from vllm_vispec.utils.errors import ViSpecError

Run = tuple[int, int]


@dataclass(frozen=True)
class RowPlan:
    """The compact rows of one prompt; all `*_of_row` and `positions` run over the rows.

    Attributes:
        runs: merged image runs [start, end) of tokens, each with one global feature.
        images: images [start, end) of tokens, each compressed by itself. With ViSpec's adaptor
            these are the runs; empty without compression.
        length: number of rows before compression (= number of prompt tokens).
        positions: RoPE position of each row, which is also the index of its hidden state.
        run_of_row: for an image row its run; for a text row the run whose global feature it
            gets (4.4), -1 for zeros.
        image_of_row: the image whose token fills it, -1 for a text row.
        token_of_row: which of that image's tokens, -1 for a text row.
        branch_of_row: the compressor's branch that made it, -1 for a text row.
    """

    runs: tuple[Run, ...]
    images: tuple[Run, ...]
    length: int
    positions: tuple[int, ...]
    run_of_row: tuple[int, ...]
    image_of_row: tuple[int, ...]
    token_of_row: tuple[int, ...]
    branch_of_row: tuple[int, ...]

    def filler_of_row(self, counts: Sequence[int]) -> list[int]:
        """Number the tokens of all images through: which of them fills a row; -1 for a text row.

        Args:
            counts: tokens of every image, including those that no row holds.
        """
        starts = [0, *accumulate(counts)]
        pairs = zip(self.image_of_row, self.token_of_row, strict=True)
        return [starts[image] + token if token >= 0 else -1 for image, token in pairs]


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
    compressor: CompressorSpec | None = None,
) -> RowPlan:
    """Lay out the compact rows of a prompt of `length` tokens.

    Args:
        length: number of prompt tokens L.
        runs: images [start, end) in prompt indices.
        num_query_tokens: outputs of ViSpec's adaptor per run; the last is the global feature.
        compress: False keeps every image row as a text row (global features still apply).
        compressor: makes an image's tokens; None: ViSpec's adaptor.
    """
    given = sorted(runs)
    merged = _behind_row_zero(merge_runs(given, length))
    spec = compressor
    if spec is None or spec.is_query:
        spec, images = CompressorSpec(QUERY, num_query_tokens - 1), merged
    else:
        images = _behind_row_zero(given)
    images = images if compress else []
    pieces: list[_Rows] = []
    done = 0
    for run, (start, end) in enumerate(merged):
        pieces.append(_text_rows(done, start - 1 if compress else end - 1, run - 1))
        for number, (first, last) in enumerate(images):
            if start <= first < end:
                pieces.append(_image_rows(first - 1, last - first, run, number, spec))
        done = end - 1
    pieces.append(_text_rows(done, length, len(merged) - 1))
    columns = (tuple(chain.from_iterable(column)) for column in zip(*pieces, strict=True))
    return RowPlan(tuple(merged), tuple(images), length, *columns)


_Rows = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], Sequence[int]]
"""Kept rows that follow each other: positions, runs, images, tokens, branches."""


def _behind_row_zero(runs: Iterable[Run]) -> list[Run]:
    return [(max(start, 1), end) for start, end in runs if end > 1]


def _text_rows(first: int, last: int, run: int) -> _Rows:
    positions = range(first, last)
    none = [-1] * len(positions)
    return positions, [run] * len(positions), none, none, none


def _image_rows(first: int, size: int, run: int, image: int, spec: CompressorSpec) -> _Rows:
    """The kept ones among the `size` rows of an image, which begins at row `first`."""
    places = place_tokens(spec, size)
    positions = (first + places.rows).tolist()
    count = len(positions)
    return (
        positions,
        [run] * count,
        [image] * count,
        places.tokens.tolist(),
        places.branches.tolist(),
    )
