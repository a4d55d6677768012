"""Where a compressor's tokens stand inside an image: numbers only, no tensors.

An image of N embeddings has N draft rows. A compressor makes M tokens of it, M <= N or not; each
token gets a row of its own and with it a RoPE position, as near as possible to the middle of what
it was made from. All other rows are holes. Rows are never shared, also between the branches of a
combination, because every branch's keys stay in the cache and only the query decides which it sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vllm_vispec.models.spec import PRIMITIVES, CompressorSpec


@dataclass(frozen=True)
class ImagePlaces:
    """The kept rows of one image, in order of their rows.

    Attributes:
        rows: int64, row inside the image.
        tokens: int64, which output of the compressor stands there; branch after branch.
        branches: int64, the branch it belongs to.
        num_tokens: outputs of the compressor, those without a row included.
    """

    rows: np.ndarray
    tokens: np.ndarray
    branches: np.ndarray
    num_tokens: int


def num_tokens(spec: CompressorSpec, size: int) -> int:
    """Tokens that a primitive makes of an image of `size` embeddings.

    A ratio larger than the image leaves one token; queries are as many as they are.
    """
    if size < 1:
        return 0
    kind = PRIMITIVES[spec.name].amount
    if kind == "ratio":
        return max(1, size // spec.amount)
    return spec.amount


def segments(size: int, count: int) -> np.ndarray:
    """Borders, int64 `[count + 1]`, of `count` stretches of nearly one length."""
    return np.arange(count + 1, dtype=np.int64) * size // max(count, 1)


def middles(size: int, count: int) -> np.ndarray:
    """The middle embedding of each of `count` stretches, int64 `[count]`."""
    borders = segments(size, count)
    return (borders[:-1] + borders[1:] - 1) // 2


def wanted_rows(spec: CompressorSpec, size: int) -> np.ndarray:
    """The row every token of a primitive would like: its middle, or the image's end for queries."""
    count = num_tokens(spec, size)
    if PRIMITIVES[spec.name].amount == "ratio":
        return middles(size, count)
    return np.arange(size - count, size, dtype=np.int64)


@lru_cache(maxsize=1024)
def place_tokens(spec: CompressorSpec, size: int) -> ImagePlaces:
    """Give every token of an image of `size` rows a row; some go without if there are too few.

    Branches with few tokens choose first, so that a token loses its row only to a shorter branch;
    queries beyond the image's start (more of them than rows) lose theirs, the last ones stay.
    """
    counts = [num_tokens(branch, size) for branch in spec.primitives]
    starts = np.concatenate(([0], np.cumsum(counts)))
    taken = np.zeros(size, dtype=bool)
    found: list[tuple[int, int, int]] = []
    for index in sorted(range(len(counts)), key=lambda i: counts[i]):
        for token, row in enumerate(wanted_rows(spec.primitives[index], size).tolist()):
            if len(found) == size:
                break
            free = next((r for r in _outwards(row, size) if not taken[r]), None)
            if free is not None:
                taken[free] = True
                found.append((free, int(starts[index]) + token, index))
    columns = np.array(sorted(found), dtype=np.int64).reshape(-1, 3).T
    return ImagePlaces(*columns, num_tokens=int(starts[-1]))


def _outwards(row: int, size: int) -> Iterator[int]:
    """`row`, then its neighbours by distance; nothing for a row before the image."""
    if row < 0:
        return
    yield row
    for distance in range(1, size):
        for near in (row - distance, row + distance):
            if 0 <= near < size:
                yield near
