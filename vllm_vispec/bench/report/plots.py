"""Charts as SVG text, the same bytes for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING

from vllm_vispec.bench.report.blocks import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (8.0, 4.2)
# Colours that are told apart with any kind of sight; the marker differs, too.
_STYLES = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#8c6d00", "v"),
    ("#56b4e9", "P"),
    ("#5b5b5b", "X"),
)
# Text as outlines, so that it looks the same everywhere; names of parts by content, not by chance.
_SVG = {"svg.fonttype": "path", "svg.hashsalt": "vispec", "font.family": "DejaVu Sans"}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@dataclass(frozen=True)
class Point:
    """A value at a place of the axis, with its interval if there is one."""

    x: str
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """A line; ``thick`` for the one that matters."""

    label: str
    points: tuple[Point, ...]
    thick: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over named places.

    Attributes:
        name: see `Figure`.
        x_label, y_label: of the axes.
        places: every place of the x axis in order, evenly spaced.
        series: the lines; where one has no point it is broken.
        parity: draw a bold line at 1.0.
        from_zero_to_one: the y axis shows shares.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    places: tuple[str, ...]
    series: tuple[Series, ...]
    parity: bool = False
    from_zero_to_one: bool = False

    @property
    def alt(self) -> str:
        """The chart in words, all values included."""
        lines = [
            f"{one.label}: " + ", ".join(f"{point.y:.2f} at {point.x}" for point in one.points)
            for one in self.series
        ]
        return f"{self.title}. {self.y_label} against {self.x_label}. " + "; ".join(lines)


def draw(chart: Chart) -> Figure:
    """Draw a chart.

    Raises:
        ViSpecError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        from vllm_vispec.errors import ViSpecError

        raise ViSpecError(
            "the report needs matplotlib: pip install 'vllm-vispec[bench]'"
        ) from error
    with rc_context(_SVG):
        canvas = Canvas(figsize=SIZE, layout="constrained")
        FigureCanvasSVG(canvas)
        _fill(canvas.add_subplot(), chart)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata=_NO_METADATA)
    return Figure(chart.name, chart.alt, buffer.getvalue())


def _fill(axes: Axes, chart: Chart) -> None:
    if chart.parity:
        axes.axhline(1.0, color="black", linewidth=3, zorder=1)
    for place, series in enumerate(chart.series):
        _line(axes, chart.places, series, _STYLES[place % len(_STYLES)])
    axes.set_title(chart.title, parse_math=False, fontsize="medium")
    axes.set_xlabel(chart.x_label, parse_math=False)
    axes.set_ylabel(chart.y_label, parse_math=False)
    axes.set_xticks(range(len(chart.places)), chart.places, parse_math=False)
    axes.set_xlim(-0.4, len(chart.places) - 0.6)
    low, high = axes.get_ylim()
    axes.set_ylim((0.0, 1.02) if chart.from_zero_to_one else (min(0.0, low), max(high, 1.1)))
    axes.grid(alpha=0.3)
    _legend(axes)


def _line(axes: Axes, places: Sequence[str], series: Series, style: tuple[str, str]) -> None:
    color, marker = style
    known = {point.x: point for point in series.points}
    # A place without a point breaks the line: nothing was measured there.
    points = [known.get(place, Point(place, nan)) for place in places]
    spread = [
        [0.0 if point.low is None else max(point.y - point.low, 0.0) for point in points],
        [0.0 if point.high is None else max(point.high - point.y, 0.0) for point in points],
    ]
    axes.errorbar(
        range(len(places)),
        [point.y for point in points],
        yerr=spread,
        color=color,
        marker=marker,
        linewidth=2.6 if series.thick else 1.3,
        elinewidth=1,
        capsize=3,
        # matplotlib hides labels that begin with an underscore.
        label=f" {series.label}" if series.label.startswith("_") else series.label,
        zorder=3,
    )


def _legend(axes: Axes) -> None:
    legend = axes.legend(fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)
