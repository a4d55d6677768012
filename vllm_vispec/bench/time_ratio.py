"""Speedups: ratios of summed times."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from vllm_vispec.bench.bootstrap import Numbers
from vllm_vispec.bench.pairing import Cells, Pair, pairs, ratio
from vllm_vispec.bench.schema import Request


@dataclass(frozen=True)
class TimeRatio:
    """Seconds per token of the plain side over the side's, for samples that both answered.

    Attributes:
        seconds: of a request.
        tokens: that they were spent on; a request without any does not count.
    """

    seconds: Callable[[Request], float]
    tokens: Callable[[Request], int]

    def __call__(self, cells: Cells, plain: Cells) -> float | None:
        """Return the ratio; None without such samples."""
        return self.of_sums(self.sums(pairs(cells, plain))[None, None])

    def sums(self, drawn: Iterable[Pair]) -> Numbers:
        """Return what a ratio of these pairs is made of, ``[4]``."""
        terms = np.array([self._terms(pair) for pair in drawn], dtype=np.float64)
        return terms.reshape(-1, 4).sum(axis=0)

    @staticmethod
    def of_sums(sums_RS4: Numbers) -> float | None:
        """Return the ratio of the pairs of R repetitions and S samples; None if there is none."""
        mine_s, mine_n, theirs_s, theirs_n = sums_RS4.sum(axis=(0, 1)).tolist()
        mine, theirs = ratio(mine_s, mine_n), ratio(theirs_s, theirs_n)
        return None if mine is None or theirs is None else ratio(theirs, mine)

    def _terms(self, pair: Pair) -> tuple[float, int, float, int]:
        mine, theirs = pair
        if not (succeeded(mine) and succeeded(theirs)):
            return 0.0, 0, 0.0, 0
        return (*self._one(mine), *self._one(theirs))

    def _one(self, request: Request) -> tuple[float, int]:
        tokens = self.tokens(request)
        return (self.seconds(request), tokens) if tokens > 0 else (0.0, 0)


def succeeded(request: Request) -> bool:
    """Whether a request has an answer."""
    return request.error is None and request.output_tokens > 0


DECODING = TimeRatio(lambda request: request.decode_s, lambda request: request.output_tokens - 1)
END_TO_END = TimeRatio(lambda request: request.e2e_s, lambda request: request.output_tokens)
