"""What rounds accept: per position, and in all."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_vispec.bench.report.blocks import Block, Paragraph, Table
from vllm_vispec.bench.report.facts import Facts, Row, slice_of, sorted_by_side
from vllm_vispec.bench.report.plots import Chart, Point, Series, draw
from vllm_vispec.bench.report.sections.base import (
    NOTHING,
    Section,
    number,
    point_text,
    share,
)


def build(facts: Facts) -> Sequence[Block]:
    """A line per side at the point the report leads with."""
    if facts.main is None:
        return ()
    rows = [
        row
        for row in sorted_by_side(facts.find(**slice_of(facts.main.key, "side")))
        if row.positions()
    ]
    if not rows:
        return ()
    where = point_text(facts.main.key)
    intro = (
        f"At {where}. Share of all rounds that accept the draft token at each position, from "
        "vLLM's counters; the shares of a row add up to accepted_draft."
    )
    return Paragraph(intro), draw(_chart(facts, rows, where)), _table(rows)


def _chart(facts: Facts, rows: Sequence[Row], where: str) -> Chart:
    depth = max(len(row.positions()) for row in rows)
    return Chart(
        name="acceptance_by_position",
        title=where,
        x_label="position of the draft token",
        y_label="share of rounds that accept it",
        places=tuple(str(place) for place in range(1, depth + 1)),
        series=tuple(
            Series(
                row.key.side,
                tuple(Point(str(i), value) for i, value in enumerate(row.positions(), start=1)),
                thick=row.key.side == facts.side,
            )
            for row in rows
        ),
        from_zero_to_one=True,
    )


def _table(rows: Sequence[Row]) -> Table:
    depth = max(len(row.positions()) for row in rows)
    head = ("side", *(str(place) for place in range(1, depth + 1)), "accepted_draft")
    body = []
    for row in rows:
        shares = [share(value) for value in row.positions()]
        shares += [NOTHING] * (depth - len(shares))
        accepted, tokens = row.value("accepted_draft"), row.value("tokens_per_round")
        body.append(
            (row.key.side, *shares, number(accepted, 2), number(tokens, 2), str(row.number))
        )
    return Table((*head, "tokens_per_round", "row"), tuple(body))


ACCEPTANCE = Section(
    "acceptance",
    "Acceptance per position",
    build,
    "Not shown: no side reported which draft positions were accepted.",
)
