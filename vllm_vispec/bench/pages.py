"""Markdown from a template, and the HTML page of it, which loads nothing from elsewhere.

Whatever is filled in is escaped: what a user wrote cannot become markup.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader
from markdown_it import MarkdownIt
from markupsafe import Markup

# An underscore inside of a word means nothing, and escaped names are hard to read.
_SPECIAL = re.compile(r"([\\`*{}\[\]<>#|~$!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
_LINE_BREAKS = re.compile(r"[\r\n]+")
_TYPED = re.compile(r"<p>([^\n]*)</p>\n<pre><code>(.*?)\n</code></pre>", re.DOTALL)


def to_markdown(template: str, **context: Any) -> str:
    """Return a template filled in."""
    environment = _environment(finalize=escape)
    environment.filters |= {"code": code, "fenced": fenced, "plain": escape}
    environment.filters |= context.pop("filters", {})
    return environment.get_template(template).render(context)


def markdown_table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table of cells that are Markdown already."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def to_html(markdown: str, pictures: Mapping[str, str]) -> str:
    """Return Markdown as a page.

    Args:
        pictures: SVG of `plots/NAME.svg` by NAME.
    """
    body = (
        MarkdownIt("commonmark", {"html": False, "xhtmlOut": False})
        .enable("table")
        .render(markdown)
    )
    for tag in ("th", "td"):
        body = body.replace(f"<{tag}>", f'<{tag} class="text">')
        body = body.replace(f'<{tag} style="text-align:right">', f"<{tag}>")
    body = body.replace("<table>", '<div class="wide"><table>').replace(
        "</table>", "</table></div>"
    )
    body = _TYPED.sub(r"<details><summary>\1</summary><pre>\2</pre></details>", body)
    for name, svg in pictures.items():
        # As an image, not inline: the ids of several SVGs in one page would clash.
        data = base64.b64encode(svg.encode()).decode()
        body = body.replace(f'src="plots/{name}.svg"', f'src="data:image/svg+xml;base64,{data}"')
    chapters = {
        re.sub(r"\W+", "-", title.lower()).strip("-"): Markup(title)
        for title in re.findall(r"<h2>(.*)</h2>", body)
    }
    for anchor, title in chapters.items():
        body = body.replace(f"<h2>{title}</h2>", f'<h2 id="{anchor}">{title}</h2>')
    heading, _, body = body.partition("\n")
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=Markup(heading).striptags(),
            heading=Markup(heading),
            chapters=chapters,
            body=Markup(body),
        )
    )


def escape(value: Any) -> Markup:
    """Return text without a meaning in Markdown, on one line."""
    if isinstance(value, Markup):
        return value
    text = _LINE_BREAKS.sub(" ", str(value)).replace("&", "&amp;")
    return Markup(_SPECIAL.sub(r"\\\1", text))


def code(text: str, bar: str = "|") -> Markup:
    """Return text as it is typed; ``bar`` stands for one inside, which would end a table's cell."""
    flat = _LINE_BREAKS.sub(" ", text)
    if not flat.strip():
        return Markup("")  # there is no empty code in Markdown
    fence, pad = _fence(text, 1), " " if "`" in text else ""
    return Markup(f"{fence}{pad}{flat}{pad}{fence}".replace("|", bar))


def fenced(text: str) -> Markup:
    """Return lines as they are typed."""
    fence = _fence(text, 3)
    return Markup(f"{fence}\n{text}\n{fence}")


def _fence(text: str, least: int) -> str:
    """Return more backticks in a row than the text has."""
    return "`" * max(least, 1 + max(map(len, re.findall(r"`+", text)), default=0))


def _environment(**options: Any) -> Environment:
    return Environment(
        loader=PackageLoader("vllm_vispec.bench"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
