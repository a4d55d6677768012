"""Acceptance by ratio and by epochs, as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation.intervals import Estimate
from benchmarks.compressors.arms import REFERENCE, SCALING, SWEEPS
from benchmarks.compressors.findings import Finding, at_main_epoch
from benchmarks.picture import COLORS, error_bars, legend, new_figure, save
from vllm_vispec.compressors.spec import PRIMITIVES

SIZE_INCHES = (13, 4.5)


def draw(findings: Sequence[Finding], file: Path) -> None:
    """Draw tokens_per_round on the image tasks: over ratios, over queries, over epochs."""
    figure = new_figure(SIZE_INCHES)
    ratios, queries, epochs = figure.subplots(1, 3, sharey=True)
    known = {one.arm.name: one for one in at_main_epoch(findings)}
    for axes, kind in ((ratios, "ratio"), (queries, "queries")):
        _sweeps(axes, kind, known)
    _epochs(epochs, findings)
    ratios.set_ylabel("tokens_per_round, image tasks (95 % interval)")
    save(figure, file)


def _sweeps(axes: Any, kind: str, known: Mapping[str, Finding]) -> None:
    names = [name for name in SWEEPS if PRIMITIVES[name].amount == kind]
    for color, name in zip(COLORS, names, strict=False):
        there = {n: known[f"{name}_{n}"] for n in SWEEPS[name] if f"{name}_{n}" in known}
        _curve(axes, list(there), _tokens(there.values()), name, color)
        axes.set_xticks(SWEEPS[name])
    if REFERENCE in known:
        (level,) = _tokens([known[REFERENCE]])
        axes.axhline(level.mean, color="#777777", linestyle="--", linewidth=1, label="EagleVLM")
    axes.set_xlabel(kind)
    legend(axes)


def _epochs(axes: Any, findings: Sequence[Finding]) -> None:
    arms = {one.arm.name: one.arm for one in findings if one.arm.epochs == SCALING}
    for color, (name, arm) in zip(COLORS, arms.items(), strict=False):
        there = [one for one in findings if one.arm.name == name]
        _curve(axes, [one.cell.epochs for one in there], _tokens(there), arm.label, color)
    axes.set_xticks(SCALING)
    axes.set_xlabel("epochs")
    legend(axes)


def _tokens(findings: Iterable[Finding]) -> list[Estimate]:
    found = [one.tokens_per_round for one in findings]
    return [one for one in found if one is not None]


def _curve(
    axes: Any, places: Sequence[int], found: Sequence[Estimate], label: str, color: str
) -> None:
    if not found:
        return
    means = [one.mean for one in found]
    bars = error_bars(means, found)
    axes.errorbar(places, means, yerr=bars, marker="o", capsize=3, color=color, label=label)
