"""What the studies share: the JSON file, and a page with its tables and its picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_vispec.bench.machine import describe_machine

TABLE_MARKS = ("<!-- tables: begin -->", "<!-- tables: end -->")
_WHOLE = 1e5  # digits before the point all stay
_INNERMOST = re.compile(r'[\[{](?:[^][{}"]|"(?:[^"\\]|\\.)*")*[\]}]')


def write_report(file: Path, content: Mapping[str, Any]) -> None:
    """Write a report as JSON: five digits of each number, innermost lists and objects on a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(content), indent=1)
    text = _INNERMOST.sub(lambda found: " ".join(found.group().split()), text)
    file.write_text(text + "\n", encoding="utf-8")
    print(f"written: {file}")


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    if isinstance(value, float) and abs(value) < _WHOLE:
        return float(f"{value:.5g}")
    return value


def publish(
    output: Path,
    page: Path,
    content: Mapping[str, Any],
    tables: str,
    draw: Callable[[Path], None],
) -> None:
    """Print a study's tables, write its JSON, and put tables and picture on its page."""
    print(tables)
    write_report(output, {"machine": describe_machine(), **content})
    put_tables(page, tables)
    draw(page.with_suffix(".png"))


def put_tables(page: Path, tables: str) -> None:
    """Replace what stands between the marks of the page."""
    begin, end = TABLE_MARKS
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(begin, 1)
    page.write_text(
        f"{before}{begin}\n\n{tables}\n\n{end}{rest.split(end, 1)[1]}", encoding="utf-8"
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first row is its head."""
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
