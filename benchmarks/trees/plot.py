"""The evidence as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.picture import COLORS, error_bars, legend, new_figure, save
from benchmarks.trees.grid import Part
from benchmarks.trees.results import Row, Rows

SIZE_INCHES = (15, 6)


def draw(rows: Rows, file: Path) -> None:
    """Draw decode_speedup by policy, numbers over nodes, and decode_speedup over batches."""
    figure = new_figure(SIZE_INCHES)
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 3, 3))
    _bars(left, rows[Part.POLICIES])
    _nodes(middle, [row for row in rows[Part.NODES] if row.draft.tree is not None])
    _batches(right, rows[Part.BATCH])
    save(figure, file)


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    """Both numbers of every draft, on one scale: their gap is what rounds cost."""
    places = range(len(rows))
    kinds = (("tokens_per_round", -0.2), ("decode_speedup", 0.2))
    for (name, shift), color in zip(kinds, COLORS, strict=False):
        found = [getattr(row, name) for row in rows]
        where, values = [place + shift for place in places], [one.value for one in found]
        axes.barh(
            where, values, 0.38, xerr=error_bars(values, found), label=name, color=color, capsize=2
        )
    axes.set_yticks(list(places), [row.draft.label for row in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("batch 1, greedy (95 % interval)")
    legend(axes)


def _nodes(axes: Any, rows: Sequence[Row]) -> None:
    nodes = [row.draft.nodes for row in rows]
    for name, color in zip(("tokens_per_round", "decode_speedup"), COLORS, strict=False):
        found = [getattr(row, name) for row in rows]
        values = [one.value for one in found]
        axes.errorbar(
            nodes,
            values,
            yerr=error_bars(values, found),
            marker="o",
            capsize=3,
            color=color,
            label=name,
        )
    costs = [row.round_cost for row in rows]
    axes.plot(nodes, costs, marker="s", color=COLORS[2], label="round / plain pass")
    axes.set_xticks(nodes)
    axes.set_xlabel("nodes (num_speculative_tokens), batch 1, greedy")
    legend(axes)


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
    legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.12))
