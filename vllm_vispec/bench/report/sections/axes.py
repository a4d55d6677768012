"""decode_speedup against one axis of the matrix, all others held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

from vllm_vispec.bench.report.blocks import Block, Paragraph, Table
from vllm_vispec.bench.report.facts import (
    Facts,
    Row,
    image_text,
    slice_of,
    sorted_by_side,
    temperature_text,
)
from vllm_vispec.bench.report.plots import Chart, Point, Series, draw
from vllm_vispec.bench.report.sections.base import (
    SPEEDUP_HEAD,
    Section,
    number,
    point_text,
    speedup_cells,
)
from vllm_vispec.bench.schema import CellKey

SLICED = ("dataset", "temperature")
"""What gets a chart and a table for each of its values."""
PARITY_NOTE = "The bold line at 1.0 is plain vLLM: below it drafting loses."


def build(facts: Facts, axis: str, label: str, text: Callable[[Any], str]) -> Sequence[Block]:
    """A chart and a table for every temperature and dataset."""
    if facts.main is None or len(facts.values(axis)) < 2:
        return ()
    blocks: list[Block] = []
    for slice_values in _slices(facts, axis):
        fixed = slice_of(facts.main.key, "side", axis) | slice_values
        rows = sorted_by_side(facts.find(**fixed))
        if len({getattr(row.key, axis) for row in rows if _is_measured(row)}) > 1:
            number_of_slice = sum(isinstance(block, Table) for block in blocks)
            blocks += _slice(facts, rows, axis, label, text, number_of_slice)
    return blocks


def _slices(facts: Facts, axis: str) -> list[dict[str, Any]]:
    """Values of what gets a chart each, without the axis itself."""
    names = [name for name in SLICED if name != axis]
    return [
        dict(zip(names, values, strict=True))
        for values in product(*(facts.values(name) for name in names))
    ]


def _slice(
    facts: Facts,
    rows: Sequence[Row],
    axis: str,
    label: str,
    text: Callable[[Any], str],
    place: int,
) -> tuple[Block, ...]:
    where = point_text(rows[0].key, axis)
    asked = {getattr(row.key, axis) for row in rows}
    places = tuple(text(value) for value in facts.values(axis) if value in asked)
    chart = Chart(
        name=f"speedup_{axis}" + (f"_{place + 1}" if place else ""),
        title=where,
        x_label=label,
        y_label="decode_speedup over plain vLLM",
        places=places,
        series=_series(facts, [*filter(_is_measured, rows)], lambda key: text(getattr(key, axis))),
        parity=True,
    )
    head = ("side", label, *SPEEDUP_HEAD, "tokens_per_round", "row")
    table = Table(head, tuple(_cells(row, text(getattr(row.key, axis))) for row in rows))
    return Paragraph(f"{where[0].upper()}{where[1:]}. {PARITY_NOTE}"), draw(chart), table


def _is_measured(row: Row) -> bool:
    return row.value("decode_speedup") is not None


def _cells(row: Row, at: str) -> tuple[Any, ...]:
    tokens = number(row.value("tokens_per_round"), 2)
    return (row.key.side, at, *speedup_cells(row), tokens, str(row.number))


def _series(
    facts: Facts, rows: Sequence[Row], place: Callable[[CellKey], str]
) -> tuple[Series, ...]:
    sides = dict.fromkeys(row.key.side for row in rows)
    return tuple(
        Series(
            side,
            tuple(_point(row, place(row.key)) for row in rows if row.key.side == side),
            thick=side == facts.side,
        )
        for side in sides
    )


def _point(row: Row, place: str) -> Point:
    found = row.interval("decode_speedup")
    low, high = (end if isinstance(end, float) else None for end in (found.low, found.high))
    return Point(place, found.value if isinstance(found.value, float) else 0.0, low, high)


def _section(axis: str, title: str, label: str, text: Callable[[Any], str], what: str) -> Section:
    return Section(
        axis,
        title,
        partial(build, axis=axis, label=label, text=text),
        f"Not shown: fewer than two {what} were measured on both sides.",
    )


CONCURRENCY = _section(
    "concurrency", "Speedup against concurrency", "concurrency", str, "concurrencies"
)
IMAGE_TOKENS = _section(
    "image_tokens",
    "Speedup against image tokens",
    "image tokens per request",
    image_text,
    "numbers of image tokens",
)
K = _section("num_speculative_tokens", "Speedup against K", "K", str, "values of K")
TEMPERATURE = _section(
    "temperature",
    "Speedup against temperature",
    "temperature",
    temperature_text,
    "temperatures",
)
