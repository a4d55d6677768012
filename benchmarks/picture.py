"""What the studies' pictures share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110
COLORS = ("#4878a8", "#a85448", "#5a9a5a", "#8a6fb0", "#b08a3c", "#555555")


class Interval(Protocol):
    """Ends of an interval."""

    @property
    def low(self) -> float:
        """See above."""

    @property
    def high(self) -> float:
        """See above."""


def new_figure(size_inches: tuple[float, float]) -> Figure:
    """Return an empty figure."""
    from matplotlib.figure import Figure

    return Figure(figsize=size_inches, layout="constrained")


def save(figure: Figure, file: Path) -> None:
    """Write a figure; the same numbers give the same file, because it names no version."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI, metadata={"Software": None})


def error_bars(values: Sequence[float], found: Sequence[Interval]) -> list[list[float]]:
    """Return how far the ends lie below and above the values, as matplotlib wants them."""
    pairs = list(zip(values, found, strict=True))
    low = [max(value - one.low, 0.0) for value, one in pairs]
    return [low, [max(one.high - value, 0.0) for value, one in pairs]]


def legend(axes: Any, **place: Any) -> None:
    """Add a legend where something has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", **place)
