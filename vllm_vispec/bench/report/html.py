"""A report as one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Callable
from html import escape
from typing import Any

from vllm_vispec.bench.report.blocks import (
    Block,
    Bullets,
    Chapter,
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

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fcfcfa; --line: #d8dad5;
  --soft: #5f666d; --box: #f1f2ee; --mark: #8a1c1c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --paper: #16191c; --line: #353b41;
  --soft: #a4abb2; --box: #1f2428; --mark: #ff9b8f; } }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.2rem 5rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; border-top: 1px solid var(--line);
  padding-top: 1rem; }
nav { font-size: .9rem; color: var(--soft); } nav a { color: inherit; margin-right: 1rem; }
.lead { font-size: 1.25rem; line-height: 1.45; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .92rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem 1rem .3rem 0; text-align: right;
  vertical-align: top; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; } .text { text-align: left; }
strong { color: var(--mark); } .lead strong { color: inherit; }
code, pre { font: .88em/1.45 ui-monospace, monospace; background: var(--box); }
code { padding: .1em .3em; border-radius: .2em; overflow-wrap: anywhere; }
pre { padding: .8rem 1rem; border-radius: .4rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; }
figure { margin: .8rem 0; } figure img { max-width: 100%; background: #fff; border-radius: .4rem; }
summary { cursor: pointer; }
"""


def to_html(document: Document) -> str:
    """Return the page."""
    title = escape(document.title)
    links = "".join(
        f'<a href="#{escape(chapter.name)}">{escape(chapter.title)}</a>'
        for chapter in document.chapters
    )
    chapters = "\n".join(_chapter(chapter) for chapter in document.chapters)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{title}</h1>\n<nav>{links}</nav>\n{chapters}\n</body></html>\n"
    )


def _chapter(chapter: Chapter) -> str:
    blocks = "\n".join(_BLOCKS[type(block)](block) for block in chapter.blocks)
    name, title = escape(chapter.name), escape(chapter.title)
    return f'<section id="{name}"><h2>{title}</h2>\n{blocks}\n</section>'


def _paragraph(block: Paragraph) -> str:
    kind = ' class="lead"' if block.lead else ""
    return f"<p{kind}>{_line(block.line)}</p>"


def _bullets(block: Bullets) -> str:
    return "<ul>" + "".join(f"<li>{_line(line)}</li>" for line in block.lines) + "</ul>"


def _table(block: Table) -> str:
    head = _row(block.head, "th", block.text_columns)
    rows = "\n".join(_row(row, "td", block.text_columns) for row in block.rows)
    return f'<div class="wide"><table>\n{head}\n{rows}\n</table></div>'


def _row(cells: tuple[Line, ...], tag: str, text_columns: int) -> str:
    kinds = [' class="text"' if place < text_columns else "" for place in range(len(cells))]
    inner = "".join(
        f"<{tag}{kind}>{_line(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)
    )
    return f"<tr>{inner}</tr>"


def _figure(block: Figure) -> str:
    # As an image, not inline: the ids of several SVGs in one page would clash.
    data = base64.b64encode(block.svg.encode()).decode()
    return (
        f'<figure><img alt="{escape(block.alt)}" src="data:image/svg+xml;base64,{data}"></figure>'
    )


def _verbatim(block: Verbatim) -> str:
    return (
        f"<details><summary>{escape(block.title)}</summary>"
        f"<pre>{escape(block.text)}</pre></details>"
    )


def _line(line: Line) -> str:
    return "".join(_inline(piece) for piece in pieces(line))


def _inline(piece: Inline) -> str:
    if isinstance(piece, Strong):
        return f"<strong>{escape(piece.text)}</strong>"
    if isinstance(piece, Code):
        return f"<code>{escape(piece.text)}</code>"
    return escape(piece)


_BLOCKS: dict[type[Block], Callable[[Any], str]] = {
    Paragraph: _paragraph,
    Bullets: _bullets,
    Table: _table,
    Figure: _figure,
    Verbatim: _verbatim,
}
