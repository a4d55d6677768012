"""Every number that a benchmark report shows, defined once.

A metric is a function of the cells of one variant (the repetitions of one `CellKey`) and, where it
compares, of the baseline's cells of the same run and otherwise the same key. Its texts are in
`metrics.yaml`, from which `docs/glossary.md` is written. A metric that cannot be computed is None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import yaml
from numpy.typing import NDArray

from vllm_vispec.bench.schema import CellKey, CellResult, MemoryFacts, Request

BASELINE = "plain"
"""The variant that every other one is compared with."""
_TEXTS = Path(__file__).with_name("metrics.yaml")

Numbers: TypeAlias = NDArray[np.float64]
Cells = Sequence[CellResult]
"""Repetitions of one `CellKey`."""
Pair = tuple[Request, Request]
"""A variant's request and the baseline's, for the same sample in the same repetition."""
Value = float | tuple[float, ...] | None


@dataclass(frozen=True)
class Metric:
    """A number of a report.

    Attributes:
        definition: what it is, in words.
        formula: how it is computed, in the fields of `vllm_vispec.bench.schema`.
        compute: from the variant's cells and the baseline's; a comparing metric gets both as
            `align` returns them. A tuple has one value per draft position.
        compares: whether it needs the baseline.
        better: which direction is good, "higher" or "lower"; None if neither is.
    """

    name: str
    unit: str
    definition: str
    formula: str
    compute: Callable[[Cells, Cells], Value]
    compares: bool = False
    better: str | None = None


@dataclass(frozen=True)
class TimeRatio:
    """Seconds per token of the baseline over the variant's, for samples that both answered.

    Attributes:
        seconds: of a request.
        tokens: that they were spent on; a request without any does not count.
    """

    seconds: Callable[[Request], float]
    tokens: Callable[[Request], int]

    def __call__(self, cells: Cells, baseline: Cells) -> float | None:
        """Return the ratio; None without such samples."""
        return self.ratio_of(self.sums(pairs(cells, baseline))[None, None])

    def sums(self, drawn: Iterable[Pair]) -> Numbers:
        """Return what a ratio of these pairs is made of, ``[4]``."""
        terms = [
            [x for one in pair for x in self._terms(one)]
            for pair in drawn
            if all(one.error is None and one.output_tokens > 0 for one in pair)
        ]
        return np.array(terms, dtype=np.float64).reshape(-1, 4).sum(axis=0)

    @staticmethod
    def ratio_of(sums_RS4: Numbers) -> float | None:
        """Return the ratio of the pairs of R repetitions and S samples; None if there is none."""
        mine_s, mine_n, theirs_s, theirs_n = sums_RS4.sum(axis=(0, 1)).tolist()
        mine, theirs = ratio(mine_s, mine_n), ratio(theirs_s, theirs_n)
        return None if mine is None or theirs is None else ratio(theirs, mine)

    def _terms(self, request: Request) -> tuple[float, int]:
        tokens = self.tokens(request)
        return (self.seconds(request), tokens) if tokens > 0 else (0.0, 0)


def answered(cells: Cells) -> list[Request]:
    """Requests of all cells that gave at least one token."""
    requests = chain.from_iterable(cell.requests for cell in cells)
    return [request for request in requests if request.error is None and request.output_tokens]


def decoded(cells: Cells) -> list[Request]:
    """Answered requests of at least two tokens, so that there is something to time."""
    return [request for request in answered(cells) if request.output_tokens > 1]


def align(cells: Cells, baseline: Cells) -> tuple[tuple[CellResult, ...], tuple[CellResult, ...]]:
    """Return the repetitions that neither of the two failed as a whole, in the same order."""
    mine = {cell.repetition: cell for cell in cells if cell.error is None}
    theirs = {cell.repetition: cell for cell in baseline if cell.error is None}
    common = sorted(mine.keys() & theirs.keys())
    return tuple(mine[i] for i in common), tuple(theirs[i] for i in common)


def pairs(cells: Cells, baseline: Cells) -> Iterator[Pair]:
    """Yield the pairs of requests of cells as `align` returns them."""
    for mine, theirs in zip(cells, baseline, strict=True):
        there = dict(keyed(theirs.requests))
        for key, request in keyed(mine.requests):
            if key in there:
                yield request, there[key]


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
        replace(cell, requests=requests, wall_s=0.0, spec=None, memory=MemoryFacts())
        for cell in cells
        for requests in [tuple(one for one in cell.requests if one.family == family)]
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


def acceptance_rates(cells: Cells) -> tuple[float, ...] | None:
    """Share of steps that accepted the draft token at each position."""
    counters = [cell.spec for cell in cells if cell.spec is not None]
    steps = sum(spec.steps for spec in counters)
    places = zip_longest(*(spec.accepted_by_position for spec in counters), fillvalue=0)
    return tuple(sum(place) / steps for place in places) if steps else None


def _accepted(cells: Cells, bonus: int = 0) -> float | None:
    """Draft tokens accepted per step, and the bonus token."""
    counters = [cell.spec for cell in cells if cell.spec is not None]
    steps = sum(spec.steps for spec in counters)
    return ratio(sum(spec.accepted_tokens for spec in counters) + bonus * steps, steps)


def _ttft(cells: Cells) -> list[float]:
    return [1000 * request.ttft_s for request in answered(cells)]


def _tpot(cells: Cells) -> list[float]:
    return [1000 * one.decode_s / (one.output_tokens - 1) for one in decoded(cells)]


def _itl(cells: Cells) -> list[float]:
    return [1000 * gap for request in answered(cells) for gap in request.itl_s]


def _tokens(cells: Cells) -> int:
    return sum(request.output_tokens for request in answered(cells))


def _tokens_per_chunk(cells: Cells, _: Cells) -> float | None:
    tokens = sum(request.output_tokens - 1 for request in decoded(cells))
    return ratio(tokens, sum(len(request.itl_s) for request in decoded(cells)))


def _ttft_ratio(cells: Cells, baseline: Cells) -> float | None:
    mine, theirs = percentile(_ttft(cells), 0.5), percentile(_ttft(baseline), 0.5)
    return None if mine is None or theirs is None else ratio(mine, theirs)


def _identical_outputs(cells: Cells, baseline: Cells) -> float | None:
    """Share of the baseline's answers that the variant gave, too; None unless greedy."""
    if any(cell.key.temperature > 0 for cell in cells):
        return None
    there = [pair for pair in pairs(cells, baseline) if not pair[1].error and pair[1].output_tokens]
    return ratio(sum(mine.same_output(theirs) for mine, theirs in there), len(there))


def _failed_requests(cells: Cells, _: Cells) -> float | None:
    total = sum(len(cell.requests) for cell in cells)
    return ratio(total - len(answered(cells)), total)


def _image_table_hit_rate(cells: Cells, _: Cells) -> float | None:
    hits = sum(cell.memory.image_table_hits or 0 for cell in cells)
    return ratio(hits, hits + sum(cell.memory.image_table_misses or 0 for cell in cells))


def _peak_memory(cells: Cells, _: Cells) -> float | None:
    found = (cell.memory.peak_bytes for cell in cells)
    return max((peak / 2**30 for peak in found if peak is not None), default=None)


def _kv_blocks(cells: Cells, _: Cells) -> float | None:
    found = (cell.memory.kv_blocks for cell in cells)
    return min((blocks for blocks in found if blocks is not None), default=None)


SPEEDUPS: Mapping[str, TimeRatio] = MappingProxyType(
    {
        "decode_speedup": TimeRatio(lambda one: one.decode_s, lambda one: one.output_tokens - 1),
        "e2e_speedup": TimeRatio(lambda one: one.e2e_s, lambda one: one.output_tokens),
    }
)
_COMPUTE: dict[str, Callable[[Cells, Cells], Value]] = {
    "acceptance_length": lambda cells, _: _accepted(cells, bonus=1),
    "mean_accepted_tokens": lambda cells, _: _accepted(cells),
    "acceptance_rate_per_position": lambda cells, _: acceptance_rates(cells),
    "tokens_per_chunk": _tokens_per_chunk,
    **SPEEDUPS,
    "ttft_p50": lambda cells, _: percentile(_ttft(cells), 0.5),
    "ttft_p99": lambda cells, _: percentile(_ttft(cells), 0.99),
    "ttft_ratio": _ttft_ratio,
    "tpot_p50": lambda cells, _: percentile(_tpot(cells), 0.5),
    "tpot_p99": lambda cells, _: percentile(_tpot(cells), 0.99),
    "itl_p50": lambda cells, _: percentile(_itl(cells), 0.5),
    "itl_p99": lambda cells, _: percentile(_itl(cells), 0.99),
    "output_throughput": lambda cells, _: ratio(_tokens(cells), sum(x.wall_s for x in cells)),
    "identical_outputs": _identical_outputs,
    "mean_output_tokens": lambda cells, _: ratio(_tokens(cells), len(answered(cells))),
    "failed_requests": _failed_requests,
    "peak_memory": _peak_memory,
    "kv_blocks": _kv_blocks,
    "image_table_hit_rate": _image_table_hit_rate,
}
METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        name: Metric(name=name, compute=_COMPUTE[name], **texts)
        for name, texts in yaml.safe_load(_TEXTS.read_text(encoding="utf-8")).items()
    }
)


def measure(name: str, cells: Cells, baseline: Cells = ()) -> Value:
    """Return a metric of one variant; cells that failed as a whole do not count.

    Args:
        cells: the repetitions of one key.
        baseline: the baseline's cells of the same key; without them a comparing metric is None.
    """
    metric = METRICS[name]
    if metric.compares:
        return metric.compute(*align(cells, baseline))
    return metric.compute([cell for cell in cells if cell.error is None], ())


def by_key(cells: Iterable[CellResult]) -> dict[CellKey, tuple[CellResult, ...]]:
    """Return the repetitions of each key, keys in the order of their first cell."""
    groups: dict[CellKey, list[CellResult]] = {}
    for cell in cells:
        groups.setdefault(cell.key, []).append(cell)
    return {
        key: tuple(sorted(group, key=lambda cell: cell.repetition)) for key, group in groups.items()
    }


def baseline_key(key: CellKey) -> CellKey:
    """Return the key of the baseline's cells that a cell is compared with."""
    return replace(key, variant=BASELINE)
