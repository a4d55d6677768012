"""The ablation as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation.results import IMAGES, Row

SIZE_INCHES = (11, 4.5)
DPI = 110


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw tokens_per_round on the image tasks: arms as bars, epochs as a curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _bars(left, [row for row in rows if len(row.arm.epochs) == 1])
    _curve(right, [row for row in rows if len(row.arm.epochs) > 1])
    file.parent.mkdir(parents=True, exist_ok=True)
    # No version inside: the same numbers give the same file.
    figure.savefig(file, dpi=DPI, metadata={"Software": None})


def _errors(rows: Sequence[Row]) -> tuple[list[float], list[list[float]]]:
    found = [row.tokens_per_round[IMAGES] for row in rows]
    low = [max(one.mean - one.low, 0.0) for one in found]
    high = [max(one.high - one.mean, 0.0) for one in found]
    return [one.mean for one in found], [low, high]


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    means, errors = _errors(rows)
    axes.barh([row.label for row in rows], means, xerr=errors, color="#4878a8", capsize=3)
    axes.invert_yaxis()
    axes.set_xlim(left=1.0)
    axes.set_xlabel("tokens_per_round, image tasks (K = 5, 95 % interval)")


def _curve(axes: Any, rows: Sequence[Row]) -> None:
    means, errors = _errors(rows)
    epochs = [row.epochs for row in rows]
    axes.errorbar(epochs, means, yerr=errors, marker="o", capsize=3, color="#a85448")
    axes.set_xticks(epochs)
    axes.set_xlabel("epochs of online distillation")
    axes.set_ylabel("tokens_per_round, image tasks")
