"""Cells of a run that is kept in a repository: smaller, and the report has the same numbers.

Requests lie by columns, gaps are whole microseconds, and a command is written once: later lines
give the number of the line that has it. An answer is the beginning of its SHA-256, because a report
only compares answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from vllm_vispec.utils.errors import ViSpecError

Cell = dict[str, Any]
_PER_SECOND = 1_000_000


def pack(cells: Iterable[Cell]) -> str:
    """Return the lines of a `cells.jsonl`; they cannot be packed again."""
    lines: list[str] = []
    first: dict[str, int] = {}
    for cell in cells:
        command = first.setdefault(cell["command"], len(lines))
        packed = {name: value for name, value in cell.items() if name != "requests"}
        packed["columns"] = _columns(cell["requests"])
        if command < len(lines):
            packed["command"] = command
        lines.append(json.dumps(packed, separators=(",", ":"), ensure_ascii=False) + "\n")
    return "".join(lines)


def unpack(lines: Sequence[Cell]) -> list[Cell]:
    """Return cells with their requests and commands; a line that is not packed stays as it is.

    Raises:
        ViSpecError: a packed line is damaged.
    """
    cells: list[Cell] = []
    for number, cell in enumerate(lines, start=1):
        try:
            cells.append(_unpacked(cell, cells) if "columns" in cell else cell)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ViSpecError(
                f"{number}. cell: {error}; the benchmark's data is damaged, run it again"
            ) from error
    return cells


def _unpacked(line: Cell, earlier: Sequence[Cell]) -> Cell:
    cell = {name: value for name, value in line.items() if name != "columns"}
    if isinstance(line["command"], int):
        cell["command"] = earlier[line["command"]]["command"]
    return cell | {"requests": _requests(line["columns"])}


def _columns(requests: Sequence[Cell]) -> dict[str, list[Any]]:
    if not requests:
        return {}
    columns = {name: [request[name] for request in requests] for name in requests[0]}
    columns["output_text"] = [_digest(text) for text in columns["output_text"]]
    columns["itl_us"] = [
        [round(gap * _PER_SECOND) for gap in gaps] for gaps in columns.pop("itl_s")
    ]
    if not any(columns["error"]):
        del columns["error"]
    return columns


def _requests(columns: dict[str, list[Any]]) -> list[Cell]:
    if not columns:
        return []
    gaps = [[gap / _PER_SECOND for gap in gaps_us] for gaps_us in columns["itl_us"]]
    columns = {**columns, "itl_s": gaps}
    del columns["itl_us"]
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _digest(text: str) -> str:
    return text and hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]
