"""Charts as SVG text, the same bytes for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

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
        values: a row per point: ``side`` (its line), ``x`` (its place), ``y``, and the interval's
            ``low`` and ``high``, NaN if there is none. A line is broken where it has no point.
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
            f"{side}: " + ", ".join(f"{y:.2f} at {x}" for x, y in zip(line.x, line.y, strict=True))
            for side, line in self.values.groupby("side", sort=False)
        ]
        return f"{self.title}. {self.y_label} against {self.x_label}. " + "; ".join(lines)

    def draw(self) -> str:
        """Return the picture."""
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
        lines = self.values.groupby("side", sort=False)
        for (side, line), color, marker in zip(lines, cycle(_COLORS), cycle(_MARKERS)):
            points = line.set_index("x").reindex(self.places)
            spread = [points.y - points.low, points.high - points.y]
            axes.errorbar(
                range(len(points)),
                points.y,
                yerr=[ends.clip(0).fillna(0) for ends in spread],
                color=color,
                marker=marker,
                linewidth=2.6 if side == self.thick else 1.3,
                elinewidth=1,
                capsize=3,
                # matplotlib hides labels that begin with an underscore.
                label=f" {side}" if str(side).startswith("_") else side,
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
