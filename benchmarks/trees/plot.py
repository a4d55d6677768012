"""The evidence as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.trees.grid import Part
from benchmarks.trees.numbers import Estimate
from benchmarks.trees.results import Row, Rows

SIZE_INCHES = (15, 6)
DPI = 110
COLORS = ("#4878a8", "#a85448", "#5a9a5a", "#8a6fb0", "#b08a3c", "#555555")


def draw(rows: Rows, file: Path) -> None:
    """Draw decode_speedup by policy, numbers over nodes, and decode_speedup over batches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 3, 3))
    _bars(left, rows[Part.POLICIES])
    _nodes(middle, [row for row in rows[Part.NODES] if row.draft.tree is not None])
    _batches(right, rows[Part.BATCH])
    file.parent.mkdir(parents=True, exist_ok=True)
    # No version inside: the same numbers give the same file.
    figure.savefig(file, dpi=DPI, metadata={"Software": None})


def _errors(found: Sequence[Estimate]) -> list[list[float]]:
    low = [max(one.value - one.low, 0.0) for one in found]
    return [low, [max(one.high - one.value, 0.0) for one in found]]


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    """Both numbers of every draft, on one scale: their gap is what rounds cost."""
    places = range(len(rows))
    kinds = (("tokens_per_round", -0.2), ("decode_speedup", 0.2))
    for (name, shift), color in zip(kinds, COLORS, strict=False):
        found = [getattr(row, name) for row in rows]
        where, values = [place + shift for place in places], [one.value for one in found]
        axes.barh(where, values, 0.38, xerr=_errors(found), label=name, color=color, capsize=2)
    axes.set_yticks(list(places), [row.draft.label for row in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("batch 1, greedy (95 % interval)")
    _legend(axes)


def _nodes(axes: Any, rows: Sequence[Row]) -> None:
    nodes = [row.draft.nodes for row in rows]
    for name, color in zip(("tokens_per_round", "decode_speedup"), COLORS, strict=False):
        found = [getattr(row, name) for row in rows]
        values = [one.value for one in found]
        axes.errorbar(
            nodes, values, yerr=_errors(found), marker="o", capsize=3, color=color, label=name
        )
    costs = [row.round_cost for row in rows]
    axes.plot(nodes, costs, marker="s", color=COLORS[2], label="round / plain pass")
    axes.set_xticks(nodes)
    axes.set_xlabel("nodes (num_speculative_tokens), batch 1, greedy")
    _legend(axes)


def _batches(axes: Any, rows: Sequence[Row]) -> None:
    drafts = dict.fromkeys(row.draft for row in rows)
    for draft, color in zip(drafts, COLORS, strict=False):
        mine = [row for row in rows if row.draft == draft]
        found = [row.decode_speedup.value for row in mine]
        sizes = [row.batch for row in mine]
        axes.plot(sizes, found, marker="o", color=color, label=draft.label)
    axes.axhline(1.0, color="#777777", linestyle="--", linewidth=1)
    if rows:
        axes.set_xscale("log", base=2)
        sizes = sorted({row.batch for row in rows})
        axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("requests at a time (greedy)")
    axes.set_ylabel("decode_speedup over plain vLLM at the same batch")
    # Below: names are longer than the axes are wide.
    _legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def _legend(axes: Any, **place: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", **place)
