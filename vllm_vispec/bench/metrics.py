"""Every number that a benchmark report shows, defined once.

A metric is a function of the cells of one side (the repetitions of one `CellKey`) and, where it
compares, of the plain side's cells of the same run and otherwise the same key. `docs/glossary.md`
is written from this registry. A metric that cannot be computed is None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from types import MappingProxyType
from typing import Literal

from vllm_vispec.bench.pairing import (
    PLAIN_SIDE,
    Cells,
    align,
    answered,
    decoded,
    pairs,
    percentile,
    ratio,
)
from vllm_vispec.bench.schema import CellKey, CellResult
from vllm_vispec.bench.time_ratio import DECODING, END_TO_END, succeeded
from vllm_vispec.utils.errors import ViSpecError

Value = float | tuple[float, ...] | None
Unit = Literal["x", "tokens", "tokens/s", "ms", "share", "GiB", "blocks"]
Resampled = Literal["requests", "repetitions", "nothing"]


@dataclass(frozen=True)
class Metric:
    """A number of a report.

    Attributes:
        definition: what it is, in words.
        formula: how it is computed, in the fields of `vllm_vispec.bench.schema`.
        compute: from the side's cells and the plain side's; a comparing metric gets both as
            `align` returns them. A tuple has one value per draft position.
        compares: whether it needs the plain side.
        better: which direction is good; None if neither is.
        resampled: what its interval varies: requests and repetitions, repetitions alone (where the
            server counts for the cell as a whole), or nothing (there is no interval).
    """

    name: str
    unit: Unit
    definition: str
    formula: str
    compute: Callable[[Cells, Cells], Value]
    compares: bool = False
    better: Literal["higher", "lower"] | None = None
    resampled: Resampled = "requests"


def _accepted(cells: Cells, own: int = 0) -> float | None:
    """Draft tokens accepted per round, and the target's own."""
    counters = [cell.spec for cell in cells if cell.spec is not None]
    rounds = sum(spec.rounds for spec in counters)
    return ratio(sum(spec.accepted_tokens for spec in counters) + own * rounds, rounds)


def accepted_at(cells: Cells) -> tuple[float, ...] | None:
    """Share of rounds that accepted the draft token at each position."""
    counters = [cell.spec for cell in cells if cell.spec is not None]
    rounds = sum(spec.rounds for spec in counters)
    places = zip_longest(*(spec.accepted_by_position for spec in counters), fillvalue=0)
    return tuple(sum(place) / rounds for place in places) if rounds else None


def _milliseconds(
    share: float, seconds: Callable[[Cells], Iterable[float]]
) -> Callable[[Cells, Cells], float | None]:
    return lambda cells, _: percentile((1000 * value for value in seconds(cells)), share)


def _ttft(cells: Cells) -> list[float]:
    return [request.ttft_s for request in answered(cells)]


def _tpot(cells: Cells) -> list[float]:
    return [request.decode_s / (request.output_tokens - 1) for request in decoded(cells)]


def _itl(cells: Cells) -> list[float]:
    return [gap for request in answered(cells) for gap in request.itl_s]


def _tokens(cells: Cells) -> int:
    return sum(request.output_tokens for request in answered(cells))


def _tokens_per_chunk(cells: Cells) -> float | None:
    requests = decoded(cells)
    tokens = sum(request.output_tokens - 1 for request in requests)
    return ratio(tokens, sum(len(request.itl_s) for request in requests))


def _ttft_ratio(cells: Cells, plain: Cells) -> float | None:
    mine, theirs = percentile(_ttft(cells), 0.5), percentile(_ttft(plain), 0.5)
    return None if mine is None or theirs is None else ratio(mine, theirs)


def _identical_outputs(cells: Cells, plain: Cells) -> float | None:
    """Share of plain's answers that the side gave, too; None unless greedy."""
    if any(cell.key.temperature > 0 for cell in cells):
        return None
    asked = [pair for pair in pairs(cells, plain) if succeeded(pair[1])]
    return ratio(sum(mine.same_output(theirs) for mine, theirs in asked), len(asked))


def _failed_requests(cells: Cells) -> float | None:
    total = sum(len(cell.requests) for cell in cells)
    return ratio(total - len(answered(cells)), total)


def _image_table_hit_rate(cells: Cells) -> float | None:
    hits = sum(cell.memory.image_table_hits or 0 for cell in cells)
    return ratio(hits, hits + sum(cell.memory.image_table_misses or 0 for cell in cells))


def _peak_memory(cells: Cells) -> float | None:
    found = (cell.memory.peak_bytes for cell in cells)
    return max((peak / 2**30 for peak in found if peak is not None), default=None)


def _kv_blocks(cells: Cells) -> float | None:
    found = (cell.memory.kv_blocks for cell in cells)
    return min((blocks for blocks in found if blocks is not None), default=None)


_METRICS = (
    Metric(
        "tokens_per_round",
        "tokens",
        "Tokens that a round yields: the accepted draft tokens and the target's own.",
        "accepted_draft + 1",
        lambda cells, _: _accepted(cells, own=1),
        better="higher",
        resampled="repetitions",
    ),
    Metric(
        "accepted_draft",
        "tokens",
        "Draft tokens accepted in a round, the target's own token not counted.",
        "Σ accepted_tokens / Σ rounds, pooled over repetitions, never a mean of means",
        lambda cells, _: _accepted(cells),
        better="higher",
        resampled="repetitions",
    ),
    Metric(
        "accepted_at",
        "share",
        "For each draft position, the share of rounds that accepted its token. Their sum is "
        "accepted_draft.",
        "Σ accepted_by_position[i] / Σ rounds",
        lambda cells, _: accepted_at(cells),
        better="higher",
        resampled="repetitions",
    ),
    Metric(
        "tokens_per_chunk",
        "tokens",
        "tokens_per_round as the client sees it, which can be had per task. Slightly lower than "
        "the counters' where an answer ends inside a round, higher where the server sends two "
        "rounds as one chunk; 1 for plain.",
        "Σ (output_tokens - 1) / Σ len(itl_s), requests of two tokens or more",
        lambda cells, _: _tokens_per_chunk(cells),
        better="higher",
    ),
    Metric(
        "decode_speedup",
        "x",
        "How many times faster a token follows the one before it than on the plain side: decode "
        "time per token after the first, prefill and vision tower excluded. Same run, same "
        "concurrency, same samples; samples that either side failed are left out.",
        "d(plain) / d(side) with d = Σ (e2e_s - ttft_s) / Σ (output_tokens - 1)",
        DECODING,
        compares=True,
        better="higher",
    ),
    Metric(
        "e2e_speedup",
        "x",
        "The same from request to last token, prefill, vision tower and waiting included.",
        "t(plain) / t(side) with t = Σ e2e_s / Σ output_tokens",
        END_TO_END,
        compares=True,
        better="higher",
    ),
    Metric(
        "ttft_p50",
        "ms",
        "TTFT, time to first token: from sending a request to the first chunk of its answer.",
        "median of ttft_s",
        _milliseconds(0.50, _ttft),
        better="lower",
    ),
    Metric(
        "ttft_p99",
        "ms",
        "The TTFT that 99 % of the requests stay below.",
        "99th percentile of ttft_s, interpolated",
        _milliseconds(0.99, _ttft),
        better="lower",
    ),
    Metric(
        "ttft_ratio",
        "x",
        "What drafting does to the first token: 1.05 is 5 % later than plain.",
        "median ttft_s(side) / median ttft_s(plain)",
        _ttft_ratio,
        compares=True,
        better="lower",
    ),
    Metric(
        "tpot_p50",
        "ms",
        "TPOT, time per output token: a request's decode time per token after the first.",
        "median over requests of (e2e_s - ttft_s) / (output_tokens - 1)",
        _milliseconds(0.50, _tpot),
        better="lower",
    ),
    Metric(
        "tpot_p99",
        "ms",
        "The TPOT that 99 % of the requests stay below.",
        "99th percentile of the same, interpolated",
        _milliseconds(0.99, _tpot),
        better="lower",
    ),
    Metric(
        "itl_p50",
        "ms",
        "ITL, inter-token latency as `vllm bench serve` has it: the gap between two chunks of a "
        "stream. With speculation a chunk holds a round's tokens, so gaps are longer and fewer: "
        "compare TPOT between sides, and ITL for how evenly text appears.",
        "median of all itl_s",
        _milliseconds(0.50, _itl),
        better="lower",
    ),
    Metric(
        "itl_p99",
        "ms",
        "The gap that 99 % of the gaps stay below.",
        "99th percentile of all itl_s, interpolated",
        _milliseconds(0.99, _itl),
        better="lower",
    ),
    Metric(
        "output_throughput",
        "tokens/s",
        "Output tokens per second of the whole server at this concurrency.",
        "Σ output_tokens / Σ wall_s",
        lambda cells, _: ratio(_tokens(cells), sum(cell.wall_s for cell in cells)),
        better="higher",
        resampled="repetitions",
    ),
    Metric(
        "identical_outputs",
        "share",
        "Of the samples that plain answered, the share that the side answered with the same text "
        "(special tokens included) and as many tokens. Greedy cells only; a request that failed "
        "on the side counts as different.",
        "share of pairs with same_output, same repetition",
        _identical_outputs,
        compares=True,
        better="higher",
    ),
    Metric(
        "mean_output_tokens",
        "tokens",
        "Mean length of an answer, so that a side that merely answers shorter shows.",
        "Σ output_tokens / answered requests",
        lambda cells, _: ratio(_tokens(cells), len(answered(cells))),
    ),
    Metric(
        "failed_requests",
        "share",
        "Share of requests without an answer.",
        "requests with an error or no token / requests",
        lambda cells, _: _failed_requests(cells),
        better="lower",
        resampled="nothing",
    ),
    Metric(
        "peak_memory",
        "GiB",
        "Most memory the side's server held since its start: device memory on a GPU, resident "
        "memory on a CPU.",
        "max peak_bytes / 2^30",
        lambda cells, _: _peak_memory(cells),
        better="lower",
        resampled="nothing",
    ),
    Metric(
        "kv_blocks",
        "blocks",
        "KV-cache blocks that the server has, what the draft takes subtracted.",
        "min kv_blocks",
        lambda cells, _: _kv_blocks(cells),
        better="higher",
        resampled="nothing",
    ),
    Metric(
        "image_table_hit_rate",
        "share",
        "Of the lookups of an image in ViSpec's image table, one per request and step, the share "
        "that found it, so that the adaptor did not run.",
        "Σ image_table_hits / Σ (image_table_hits + image_table_misses)",
        lambda cells, _: _image_table_hit_rate(cells),
        better="higher",
        resampled="nothing",
    ),
)
METRICS: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _METRICS})


def measure(name: str, cells: Cells, plain: Cells = ()) -> Value:
    """Return a metric of one side; cells that failed as a whole do not count.

    Args:
        cells: the repetitions of one key.
        plain: the plain side's cells of the same key; without them a comparing metric is None.

    Raises:
        ViSpecError: there is no such metric.
    """
    metric = find_metric(name)
    return metric.compute(*usable(metric, cells, plain))


def find_metric(name: str) -> Metric:
    """Return a metric by its name.

    Raises:
        ViSpecError: there is none.
    """
    if name not in METRICS:
        raise ViSpecError(f"metric {name} is unknown; there are {', '.join(METRICS)}")
    return METRICS[name]


def usable(metric: Metric, cells: Cells, plain: Cells) -> tuple[Cells, Cells]:
    """Return the cells, of the side and of plain, that the metric is computed from."""
    if metric.compares:
        return align(cells, plain)
    return tuple(cell for cell in cells if cell.error is None), ()


def by_key(cells: Iterable[CellResult]) -> dict[CellKey, tuple[CellResult, ...]]:
    """Return the repetitions of each key, keys in the order of their first cell."""
    groups: dict[CellKey, list[CellResult]] = {}
    for cell in cells:
        groups.setdefault(cell.key, []).append(cell)
    return {
        key: tuple(sorted(group, key=lambda cell: cell.repetition)) for key, group in groups.items()
    }


def plain_key(key: CellKey) -> CellKey:
    """Return the key of the plain cells that a cell is compared with."""
    return replace(key, side=PLAIN_SIDE)
