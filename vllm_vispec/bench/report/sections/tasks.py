"""Every task family by itself."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_vispec.bench.report.blocks import Block, Line, Paragraph, Table
from vllm_vispec.bench.report.facts import Facts, Row, slice_of, sorted_by_side
from vllm_vispec.bench.report.sections.base import (
    SPEEDUP_HEAD,
    Section,
    number,
    point_text,
    speedup_cells,
)


def build(facts: Facts) -> Sequence[Block]:
    """Families by sides at the point the report leads with."""
    if facts.main is None or not any(facts.main.families):
        return ()
    rows = [
        row
        for row in sorted_by_side(facts.find(**slice_of(facts.main.key, "side")))
        if row.value("decode_speedup") is not None
    ]
    intro = (
        f"At {point_text(facts.main.key)}. tokens_per_chunk stands for tokens_per_round here: the "
        "server's counters know no tasks."
    )
    head: tuple[Line, ...] = ("task", "side", *SPEEDUP_HEAD, "tokens_per_chunk", "answers", "row")
    body = [_cells(row, family) for family in facts.main.families for row in rows]
    return Paragraph(intro), Table(head, tuple(body), text_columns=2)


def _cells(row: Row, family: str) -> tuple[Line, ...]:
    part = row.of_family(family)
    return (
        family or "(none)",
        row.key.side,
        *speedup_cells(part),
        number(part.value("tokens_per_chunk"), 2),
        str(part.num_answered),
        str(row.number),
    )


TASKS = Section("tasks", "By task", build, "Not shown: the requests name no task families.")
