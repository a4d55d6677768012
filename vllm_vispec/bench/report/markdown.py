"""A report as Markdown; its pictures are files beside it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from vllm_vispec.bench.report.blocks import (
    Block,
    Bullets,
    Code,
    Document,
    Figure,
    Inline,
    Line,
    Paragraph,
    Strong,
    Table,
    Verbatim,
    pieces,
)

PLOTS = "plots"
# An underscore inside of a word means nothing, and escaped names are hard to read.
_SPECIAL = re.compile(r"([\\`*{}\[\]<>#|~$!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
_LINE_BREAKS = re.compile(r"[\r\n]+")


def to_markdown(document: Document) -> str:
    """Return the report; pictures are referred to as `plots/NAME.svg`."""
    parts = [f"# {_escape(document.title)}"]
    for chapter in document.chapters:
        parts.append(f"## {_escape(chapter.title)}")
        parts += [_block(block) for block in chapter.blocks]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    return _BLOCKS[type(block)](block)


def _paragraph(block: Paragraph) -> str:
    return _line(block.line)


def _bullets(block: Bullets) -> str:
    return "\n".join(f"- {_line(line)}" for line in block.lines)


def _table(block: Table) -> str:
    numbers = len(block.head) - block.text_columns
    rule = ["---"] * block.text_columns + ["---:"] * numbers
    # A bar would end the cell even inside of code.
    rows = [[_line(cell, bar="\\|") for cell in row] for row in (block.head, *block.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def _figure(block: Figure) -> str:
    return f"![{_escape(block.alt)}]({PLOTS}/{block.name}.svg)"


def _verbatim(block: Verbatim) -> str:
    fence = "`" * (max(_longest_run(block.text) + 1, 3))
    return f"{_escape(block.title)}\n\n{fence}\n{block.text}\n{fence}"


def _line(line: Line, bar: str = "|") -> str:
    return "".join(_inline(piece, bar) for piece in pieces(line))


def _inline(piece: Inline, bar: str) -> str:
    if isinstance(piece, Strong):
        return f"**{_escape(piece.text)}**"
    if isinstance(piece, Code):
        return _code(piece.text).replace("|", bar)
    return _escape(piece)


def _code(text: str) -> str:
    if not text.strip():
        return ""  # there is no empty code in Markdown
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{_LINE_BREAKS.sub(' ', text)}{pad}{fence}"


def _escape(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", _LINE_BREAKS.sub(" ", text).replace("&", "&amp;"))


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)


_BLOCKS: dict[type, Callable[[Any], str]] = {
    Paragraph: _paragraph,
    Bullets: _bullets,
    Table: _table,
    Figure: _figure,
    Verbatim: _verbatim,
}
