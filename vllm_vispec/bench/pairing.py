"""Requests of cells: those that succeeded, the same ones on two sides, and percentiles.

A cell is one repetition; "cells" are the repetitions of one `CellKey`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from vllm_vispec.bench.schema import CellResult, MemoryFacts, Request

PLAIN_SIDE = "plain"
"""The side that every other one is compared with."""

Cells = Sequence[CellResult]
Pair = tuple[Request, Request]


def answered(cells: Cells) -> list[Request]:
    """Requests of all cells that gave at least one token."""
    requests = chain.from_iterable(cell.requests for cell in cells)
    return [request for request in requests if request.error is None and request.output_tokens]


def decoded(cells: Cells) -> list[Request]:
    """Answered requests of at least two tokens, so that there is something to time."""
    return [request for request in answered(cells) if request.output_tokens > 1]


def align(side: Cells, plain: Cells) -> tuple[tuple[CellResult, ...], tuple[CellResult, ...]]:
    """Return the repetitions that neither side failed as a whole, in the same order."""
    mine = {cell.repetition: cell for cell in side if cell.error is None}
    theirs = {cell.repetition: cell for cell in plain if cell.error is None}
    common = sorted(mine.keys() & theirs.keys())
    return tuple(mine[i] for i in common), tuple(theirs[i] for i in common)


def pairs(side: Cells, plain: Cells) -> Iterator[Pair]:
    """Yield (side's, plain's) request for the same sample in the same repetition.

    Args:
        side, plain: as `align` returns them.
    """
    for mine, theirs in zip(side, plain, strict=True):
        if _names(mine) == _names(theirs):
            yield from zip(mine.requests, theirs.requests, strict=True)
            continue
        there = dict(keyed(theirs.requests))
        for key, request in keyed(mine.requests):
            if key in there:
                yield request, there[key]


def _names(cell: CellResult) -> list[str]:
    return [request.sample_id for request in cell.requests]


def keyed(requests: Iterable[Request]) -> Iterator[tuple[tuple[str, int], Request]]:
    """Yield requests under (sample, how often it was asked before in this cell)."""
    seen: Counter[str] = Counter()
    for request in requests:
        yield (request.sample_id, seen[request.sample_id]), request
        seen[request.sample_id] += 1


def only_family(cells: Cells, family: str) -> tuple[CellResult, ...]:
    """Return the cells with the requests of one task family.

    Counters, memory and wall time are those of all requests, and therefore left out.
    """
    return tuple(
        replace(
            cell,
            requests=tuple(request for request in cell.requests if request.family == family),
            wall_s=0.0,
            spec=None,
            memory=MemoryFacts(),
        )
        for cell in cells
    )


def percentile(values: Iterable[float], share: float) -> float | None:
    """Return the value below which a share of the values lies; None without values.

    Interpolated linearly, as by `vllm bench serve`.
    """
    numbers = list(values)
    return float(np.quantile(numbers, share)) if numbers else None


def ratio(above: float, below: float) -> float | None:
    """Return a quotient; None where the divisor is not positive."""
    return above / below if below > 0 else None
