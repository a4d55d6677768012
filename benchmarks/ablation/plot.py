"""The ablation as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation.results import IMAGES, Row
from benchmarks.picture import COLORS, error_bars, new_figure, save

SIZE_INCHES = (11, 4.5)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw tokens_per_round on the image tasks: arms as bars, epochs as a curve."""
    figure = new_figure(SIZE_INCHES)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _bars(left, [row for row in rows if len(row.arm.epochs) == 1])
    _curve(right, [row for row in rows if len(row.arm.epochs) > 1])
    save(figure, file)


def _errors(rows: Sequence[Row]) -> tuple[list[float], list[list[float]]]:
    found = [row.tokens_per_round[IMAGES] for row in rows]
    means = [one.mean for one in found]
    return means, error_bars(means, found)


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    means, errors = _errors(rows)
    axes.barh([row.label for row in rows], means, xerr=errors, color=COLORS[0], capsize=3)
    axes.invert_yaxis()
    axes.set_xlim(left=1.0)
    axes.set_xlabel("tokens_per_round, image tasks (K = 5, 95 % interval)")


def _curve(axes: Any, rows: Sequence[Row]) -> None:
    means, errors = _errors(rows)
    epochs = [row.epochs for row in rows]
    axes.errorbar(epochs, means, yerr=errors, marker="o", capsize=3, color=COLORS[1])
    axes.set_xticks(epochs)
    axes.set_xlabel("epochs of online distillation")
    axes.set_ylabel("tokens_per_round, image tasks")
