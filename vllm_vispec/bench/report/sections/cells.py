"""Every cell of the matrix: speed, latency and memory, failures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from vllm_vispec.bench.pairing import PLAIN_SIDE
from vllm_vispec.bench.report.blocks import Block, Bullets, Line, Paragraph, Strong, Table
from vllm_vispec.bench.report.facts import Facts, Row, image_text
from vllm_vispec.bench.report.sections.base import (
    SPEEDUP_HEAD,
    Section,
    number,
    point_text,
    share,
    speedup_cells,
)

_WHERE: tuple[Line, ...] = (
    "row",
    "side",
    "dataset",
    "K",
    "concurrency",
    "temperature",
    "image tokens",
    "state",
)
_COSTS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("TTFT p50, ms", "ttft_p50", number),
    ("TTFT p99", "ttft_p99", number),
    ("TTFT / plain", "ttft_ratio", lambda value: number(value, 2)),
    ("TPOT p50, ms", "tpot_p50", lambda value: number(value, 2)),
    ("TPOT p99", "tpot_p99", lambda value: number(value, 2)),
    ("ITL p50, ms", "itl_p50", number),
    ("ITL p99", "itl_p99", number),
    ("output tokens/s", "output_throughput", number),
    ("mean output", "mean_output_tokens", number),
    ("peak memory, GiB", "peak_memory", lambda value: number(value, 2)),
    ("KV blocks", "kv_blocks", lambda value: number(value, 0)),
    ("image table hits", "image_table_hit_rate", share),
)


def build_speed(facts: Facts) -> Sequence[Block]:
    """Speedups of every cell that drafts, equality and length beside them."""
    if not facts.drafting:
        return ()
    head = (*_WHERE, *SPEEDUP_HEAD, "tokens_per_round")
    return (Table(head, tuple(_speed_row(row) for row in facts.drafting), len(_WHERE)),)


def build_costs(facts: Facts) -> Sequence[Block]:
    """Latency, throughput and memory of every cell, plain ones included."""
    if not facts.rows:
        return ()
    head = (*_WHERE, *(title for title, _, _ in _COSTS))
    note = (
        "ITL is the gap between two chunks of a stream, and a chunk holds the tokens of a round: "
        "compare sides by TPOT. Peak memory is that of the side's server since its start."
    )
    rows = tuple(
        (*_where(row), *(text(row.value(name)) for _, name, text in _COSTS)) for row in facts.rows
    )
    return Paragraph(note), Table(head, rows, len(_WHERE))


def build_failures(facts: Facts) -> Sequence[Block]:
    """What failed, and what was asked for and not measured."""
    failed = [row for row in facts.rows if row.cells and row.done < len(row.cells)]
    missing = [row for row in facts.rows if len(row.cells) < row.expected]
    flawed = [row for row in facts.rows if row.done and (row.value("failed_requests") or 0) > 0]
    lines = [
        *(line for row in failed for line in _failed_lines(row)),
        *_missing_lines(missing),
        *(_flawed_line(row) for row in flawed),
    ]
    return (Bullets(tuple(lines)),) if lines else ()


def _where(row: Row) -> tuple[Line, ...]:
    key = row.key
    is_plain = key.side == PLAIN_SIDE
    k = f"(with {key.num_speculative_tokens})" if is_plain else str(key.num_speculative_tokens)
    return (
        str(row.number),
        key.side,
        key.dataset,
        k,
        str(key.concurrency),
        f"{key.temperature:g}",
        image_text(key.image_tokens),
        row.state if row.state == "ok" else Strong(row.state),
    )


def _speed_row(row: Row) -> tuple[Line, ...]:
    return (*_where(row), *speedup_cells(row), number(row.value("tokens_per_round"), 2))


def _name(row: Row) -> str:
    return f"Row {row.number}, {row.key.side} at {point_text(row.key)}: "


def _failed_lines(row: Row) -> list[Line]:
    return [
        (_name(row), Strong("failed"), f" in repetition {cell.repetition + 1}: {cell.error}")
        for cell in row.cells
        if cell.error is not None
    ]


def _missing_lines(rows: Sequence[Row]) -> list[Line]:
    """One line for all rows that lack the same repetitions: an unfinished run has many."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        there = {cell.repetition for cell in row.cells}
        gone = [str(i + 1) for i in range(row.expected) if i not in there]
        groups[", ".join(gone)].append(row)
    return [
        (
            Strong("missing"),
            f": repetition {gone} of {'row' if len(group) == 1 else 'rows'} "
            f"{', '.join(str(row.number) for row in group)} was not measured",
        )
        for gone, group in groups.items()
    ]


def _flawed_line(row: Row) -> Line:
    errors = [one.error for cell in row.cells for one in cell.requests if one.error is not None]
    first = f", first error: {errors[0]}" if errors else ", no error given"
    return f"{_name(row)}{share(row.value('failed_requests'))} of the requests failed{first}"


SPEED = Section(
    "cells", "All speedups", build_speed, "Not shown: nothing but plain vLLM was to be measured."
)
COSTS = Section("costs", "Latency, throughput, memory", build_costs, "Not shown: no cells.")
FAILURES = Section(
    "failures",
    "Failed and missing cells",
    build_failures,
    "None: every cell that was asked for was measured, and no request failed.",
)
