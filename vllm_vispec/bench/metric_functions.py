"""How the metrics are computed; `vllm_vispec.bench.metrics` says what they mean.

Each function takes the cells of a side and those of the plain side, as `metrics.usable` gives them,
and returns None where there is nothing to compute from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vllm_vispec.bench.pairing import Cells, answered, decoded, pairs, percentile, ratio
from vllm_vispec.bench.schema import CellKey, SpecCounters
from vllm_vispec.bench.time_ratio import succeeded

Scalar = Callable[[Cells, Cells], float | None]
GIB = 2**30
MILLI = 1000


def can_compare_outputs(key: CellKey) -> bool:
    """Whether equal outputs are to be expected: greedy cells alone."""
    return key.temperature == 0


def _counters(cells: Cells) -> list[SpecCounters]:
    return [cell.spec for cell in cells if cell.spec is not None]


def accepted_draft(cells: Cells, _: Cells = ()) -> float | None:
    """Draft tokens accepted per round, bonus token not counted."""
    counters = _counters(cells)
    accepted = sum(spec.accepted_tokens for spec in counters)
    return ratio(accepted, sum(spec.rounds for spec in counters))


def tokens_per_round(cells: Cells, _: Cells) -> float | None:
    """accepted_draft + 1."""
    accepted = accepted_draft(cells)
    return None if accepted is None else accepted + 1


def accepted_at(cells: Cells, _: Cells) -> tuple[float, ...] | None:
    """Share of rounds that accepted the draft token at each position."""
    counters = _counters(cells)
    rounds = sum(spec.rounds for spec in counters)
    if not rounds:
        return None
    depth = max(len(spec.accepted_by_position) for spec in counters)
    return tuple(
        sum(sum(spec.accepted_by_position[i : i + 1]) for spec in counters) / rounds
        for i in range(depth)
    )


def tokens_per_chunk(cells: Cells, _: Cells) -> float | None:
    """Tokens after the first per later chunk of the streams."""
    requests = decoded(cells)
    return ratio(
        sum(request.output_tokens - 1 for request in requests),
        sum(len(request.itl_s) for request in requests),
    )


def at_percentile(share: float, seconds: Callable[[Cells], Iterable[float]]) -> Scalar:
    """A percentile in milliseconds."""

    def compute(cells: Cells, _: Cells) -> float | None:
        return percentile((MILLI * value for value in seconds(cells)), share)

    return compute


def ttft_seconds(cells: Cells) -> Iterable[float]:
    """Times to first token."""
    return (request.ttft_s for request in answered(cells))


def tpot_seconds(cells: Cells) -> Iterable[float]:
    """Decode time per token after the first, of every request."""
    return (request.decode_s / (request.output_tokens - 1) for request in decoded(cells))


def itl_seconds(cells: Cells) -> Iterable[float]:
    """Gaps between chunks, of all requests together."""
    return (gap for request in answered(cells) for gap in request.itl_s)


def ttft_ratio(cells: Cells, plain: Cells) -> float | None:
    """Median time to first token, the side's over plain's."""
    mine, theirs = percentile(ttft_seconds(cells), 0.5), percentile(ttft_seconds(plain), 0.5)
    return None if mine is None or theirs is None else ratio(mine, theirs)


def output_throughput(cells: Cells, _: Cells) -> float | None:
    """Output tokens per second of wall time."""
    tokens = sum(request.output_tokens for request in answered(cells))
    return ratio(tokens, sum(cell.wall_s for cell in cells))


def identical_outputs(cells: Cells, plain: Cells) -> float | None:
    """Share of plain's answers that the side gave, too; None unless greedy."""
    if not all(can_compare_outputs(cell.key) for cell in cells):
        return None
    asked = [pair for pair in pairs(cells, plain) if succeeded(pair[1])]
    return ratio(sum(mine.same_output(theirs) for mine, theirs in asked), len(asked))


def mean_output_tokens(cells: Cells, _: Cells) -> float | None:
    """Mean length of the answers."""
    requests = answered(cells)
    return ratio(sum(request.output_tokens for request in requests), len(requests))


def failed_requests(cells: Cells, _: Cells) -> float | None:
    """Share of requests without an answer."""
    total = sum(len(cell.requests) for cell in cells)
    return ratio(total - len(answered(cells)), total)


def peak_memory(cells: Cells, _: Cells) -> float | None:
    """Largest peak, in GiB."""
    found = [cell.memory.peak_bytes for cell in cells if cell.memory.peak_bytes is not None]
    return max(found) / GIB if found else None


def kv_blocks(cells: Cells, _: Cells) -> float | None:
    """Fewest KV blocks."""
    return min(
        (cell.memory.kv_blocks for cell in cells if cell.memory.kv_blocks is not None),
        default=None,
    )


def image_table_hit_rate(cells: Cells, _: Cells) -> float | None:
    """Images found in the table, of all that were looked up."""
    hits = sum(cell.memory.image_table_hits or 0 for cell in cells)
    return ratio(hits, hits + sum(cell.memory.image_table_misses or 0 for cell in cells))
