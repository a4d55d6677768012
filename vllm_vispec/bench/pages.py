"""Markdown from a template, the HTML page of it, and charts as SVG. A page loads nothing else.

Whatever is filled in is escaped: what a user wrote cannot become markup.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader
from markdown_it import MarkdownIt
from markupsafe import Markup

if TYPE_CHECKING:
    import pandas as pd

# An underscore inside of a word means nothing, and escaped names are hard to read.
_SPECIAL = re.compile(r"([\\`*{}\[\]<>#|~$!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
WIDTH = 110
"""Columns of a page in the terminal."""
_LINE_BREAKS = re.compile(r"[\r\n]+")
_TYPED = re.compile(r"<p>([^\n]*)</p>\n<pre><code>(.*?)\n</code></pre>", re.DOTALL)


def to_markdown(template: str, **context: Any) -> str:
    """Return a template filled in."""
    environment = _environment(finalize=escape)
    environment.filters |= {"code": code, "fenced": fenced, "plain": escape}
    environment.filters |= context.pop("filters", {})
    return environment.get_template(template).render(context)


def show(markdown: str) -> None:
    """Print Markdown in the terminal, its tables drawn."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console(width=WIDTH).print(Markdown(markdown))


def to_html(markdown: str, pictures: Mapping[str, str]) -> str:
    """Return Markdown as a page.

    Args:
        pictures: SVG of `plots/NAME.svg` by NAME.
    """
    renderer = MarkdownIt("commonmark", {"html": False, "xhtmlOut": False}).enable("table")
    body = renderer.render(markdown)
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
    page = _environment().get_template("report.html.j2")
    return page.render(
        title=Markup(heading).striptags(),
        heading=Markup(heading),
        chapters=chapters,
        body=Markup(body),
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


# Colours that are told apart with any kind of sight; the marker differs, too.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#5b5b5b")
_MARKERS = "os^DvPX"
# Names of parts by content, not by chance; no dates. Text stays text: a quarter of the outlines.
_SVG = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vispec",
    "font.family": ["DejaVu Sans", "sans-serif"],
}
_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


@dataclass(frozen=True, eq=False)
class Chart:
    """Lines over named places, evenly spaced.

    Attributes:
        name: file name without its ending; unique in a report.
        values: a row per point: ``variant`` (its line), ``x`` (its place), ``y``, and the
            interval's ``low`` and ``high``, NaN if there is none. A line is broken where it has no
            point.
        places: of the x axis, in order.
        thick: the line that matters.
        shares: the y axis goes from 0 to 1; else a bold line marks 1.0.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    values: pd.DataFrame
    places: Sequence[str]
    thick: str
    shares: bool = False

    @property
    def alt(self) -> str:
        """The chart in words, all values included."""
        lines = [
            f"{name}: " + ", ".join(f"{y:.2f} at {x}" for x, y in zip(line.x, line.y, strict=True))
            for name, line in self.values.groupby("variant", sort=False)
        ]
        return f"{self.title}. {self.y_label} against {self.x_label}. " + "; ".join(lines)

    def draw(self) -> str:
        """Return the picture, the same bytes for the same numbers."""
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        buffer = io.StringIO()
        with rc_context(_SVG):
            figure = Figure(figsize=(8.0, 4.2), layout="constrained")
            FigureCanvasSVG(figure)
            self._fill(figure.add_subplot())
            figure.savefig(buffer, format="svg", metadata=_METADATA)
        return buffer.getvalue()

    def _fill(self, axes: Any) -> None:
        if not self.shares:
            axes.axhline(1.0, color="black", linewidth=3, zorder=1)
        lines = self.values.groupby("variant", sort=False)
        for (variant, line), color, marker in zip(lines, cycle(_COLORS), cycle(_MARKERS)):
            points = line.set_index("x").reindex(self.places)
            spread = [points.y - points.low, points.high - points.y]
            axes.errorbar(
                range(len(points)),
                points.y,
                yerr=[ends.clip(0).fillna(0) for ends in spread],
                color=color,
                marker=marker,
                linewidth=2.6 if variant == self.thick else 1.3,
                elinewidth=1,
                capsize=3,
                # matplotlib hides labels that begin with an underscore.
                label=f" {variant}" if str(variant).startswith("_") else variant,
                zorder=3,
            )
        axes.set_title(self.title, parse_math=False, fontsize="medium")
        axes.set_xlabel(self.x_label, parse_math=False)
        axes.set_ylabel(self.y_label, parse_math=False)
        axes.set_xticks(range(len(self.places)), self.places, parse_math=False)
        axes.set_xlim(-0.4, len(self.places) - 0.6)
        low, high = axes.get_ylim()
        axes.set_ylim((0.0, 1.02) if self.shares else (min(0.0, low), max(high, 1.1)))
        axes.grid(alpha=0.3)
        for text in axes.legend(fontsize="small").get_texts():
            text.set_parse_math(False)
