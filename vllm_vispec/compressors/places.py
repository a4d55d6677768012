"""Where a compressor's tokens stand inside an image: numbers only, no tensors.

An image of N embeddings has N draft rows. A compressor makes M tokens of it, M <= N or not; each
token gets a row of its own and with it a RoPE position, as near as possible to the middle of what
it was made from. All other rows are masked. Rows are never shared, also between the branches of a
combination, because every branch's keys stay in the cache and only the query decides which it sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from vllm_vispec.compressors.spec import IDENTITY, PRIMITIVES, CompressorSpec

if TYPE_CHECKING:
    from torch import Tensor

Indices = TypeVar("Indices", np.ndarray, "Tensor")


@dataclass(frozen=True)
class ImagePlaces:
    """The rows of one image that hold a token, in their order.

    Attributes:
        rows: int64, row inside the image.
        tokens: int64, which output of the compressor stands there; branch after branch.
        branches: int64, the branch it belongs to.
    """

    rows: np.ndarray
    tokens: np.ndarray
    branches: np.ndarray


def num_tokens(spec: CompressorSpec, size: int) -> int:
    """Tokens that a primitive makes of an image of `size` embeddings.

    A ratio larger than the image leaves one token; queries are as many as they are; `identity`
    leaves all.
    """
    if size < 1:
        return 0
    if spec.name == IDENTITY:
        return size
    if PRIMITIVES[spec.name].amount == "ratio":
        return max(1, size // spec.amount)
    return spec.amount


def borders(index: Indices, size: int) -> Indices:
    """Borders `[M + 1]` of M stretches of nearly one length in an image of `size` embeddings.

    Args:
        index: 0 to M, int64, as an array or as a tensor on any device.
    """
    return index * size // max(len(index) - 1, 1)


def middles(borders: Indices) -> Indices:
    """The middle embedding `[M]` of each stretch between these borders."""
    return (borders[:-1] + borders[1:] - 1) // 2


def wanted_rows(spec: CompressorSpec, size: int) -> np.ndarray:
    """The row every token of a primitive would like: its middle, or the image's end for queries."""
    count = num_tokens(spec, size)
    if PRIMITIVES[spec.name].amount == "ratio":
        return middles(borders(np.arange(count + 1, dtype=np.int64), size))
    return np.arange(size - count, size, dtype=np.int64)


@lru_cache(maxsize=1024)
def place_tokens(spec: CompressorSpec, size: int) -> ImagePlaces:
    """Give every token of an image of `size` rows a row; some go without if there are too few.

    Branches with few tokens choose first, so that a token loses its row only to a shorter branch;
    queries beyond the image's start (more of them than rows) lose theirs, the last ones stay.
    """
    counts = [num_tokens(branch, size) for branch in spec.primitives]
    starts = np.concatenate(([0], np.cumsum(counts)))
    free = _FreeRows(size)
    found: list[tuple[int, int, int]] = []
    for index in sorted(range(len(counts)), key=lambda i: counts[i]):
        for token, wanted in enumerate(wanted_rows(spec.primitives[index], size).tolist()):
            row = free.take_nearest(wanted)
            if row is not None:
                found.append((row, int(starts[index]) + token, index))
    rows, tokens, branches = np.array(sorted(found), dtype=np.int64).reshape(-1, 3).T
    return ImagePlaces(rows, tokens, branches)


class _FreeRows:
    """Rows of one image that nobody has yet.

    Links lead from every row to the next free one on either side; they are shortened whenever they
    are followed, because a crowded image would otherwise take time that grows with its square.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        # Row r is entry r + 1; the first and the last entry stand for "none".
        self.below, self.above = list(range(size + 2)), list(range(size + 2))

    def take_nearest(self, row: int) -> int | None:
        """Take `row` or the free row nearest to it, the earlier of two; None: none, or row < 0."""
        if row < 0:
            return None
        below, above = _follow(self.below, row + 1), _follow(self.above, row + 1)
        fits_below, fits_above = below > 0, above <= self.size
        if not (fits_below or fits_above):
            return None
        nearer_below = fits_below and not (fits_above and above - row - 1 < row + 1 - below)
        entry = below if nearer_below else above
        self.below[entry], self.above[entry] = entry - 1, entry + 1
        return entry - 1


def _follow(links: list[int], entry: int) -> int:
    while links[entry] != entry:
        links[entry] = links[links[entry]]
        entry = links[entry]
    return entry
