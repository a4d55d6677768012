"""Under what conditions: the machine, the settings, the definitions, the commands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_vispec.bench.metrics import METRICS
from vllm_vispec.bench.report.blocks import Block, Code, Line, Paragraph, Table, Verbatim
from vllm_vispec.bench.report.facts import Facts, Row
from vllm_vispec.bench.report.sections.base import Section, point_text
from vllm_vispec.bench.sides import SIDES


def build_environment(facts: Facts) -> Sequence[Block]:
    """What was measured on, and what was asked for."""
    groups = (("machine", facts.run.machine), ("settings", facts.run.settings))
    rows = [
        (Code(f"{group}.{name}"), Code(value))
        for group, content in groups
        for name, value in _flat(content)
    ]
    if not rows:
        return ()
    head: tuple[Line, ...] = ("what", "value")
    return (Table(head, tuple(rows), text_columns=2),)


def build_definitions(facts: Facts) -> Sequence[Block]:
    """The sides, and every number of the report in words."""
    sides = dict.fromkeys(row.key.side for row in facts.rows)
    known = tuple(((Code(side)), SIDES[side].summary) for side in sides if side in SIDES)
    numbers = tuple(
        (Code(metric.name), metric.unit, metric.definition) for metric in METRICS.values()
    )
    tables = [Table(("side", "how the target is served"), known, text_columns=2)] if known else []
    return (*tables, Table(("number", "unit", "meaning"), numbers, text_columns=3))


def build_commands(facts: Facts) -> Sequence[Block]:
    """The commands of every row; repetitions only where theirs differ."""
    blocks = [block for row in facts.rows for block in _commands(row)]
    note = "What started the side's server and what made the load, row by row."
    return (Paragraph(note), *blocks) if blocks else ()


def _commands(row: Row) -> Iterator[Verbatim]:
    for command in dict.fromkeys(cell.command for cell in row.cells if cell.command):
        same = [str(cell.repetition + 1) for cell in row.cells if cell.command == command]
        which = "" if len(same) == len(row.cells) else f", repetition {', '.join(same)}"
        title = f"Row {row.number}: {row.key.side}, {point_text(row.key)}{which}"
        yield Verbatim(title, command)


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of nested data, names joined by dots."""
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield f"{prefix}{name}", text


ENVIRONMENT = Section(
    "environment", "Environment", build_environment, "Not known: the run describes no machine."
)
DEFINITIONS = Section("definitions", "What the words mean", build_definitions, "No definitions.")
COMMANDS = Section(
    "commands", "Commands", build_commands, "Not shown: the run recorded no commands."
)
