"""Rows of the result file, and the tables and the picture of the page.

A row is plain data, a draft under a condition and at a batch size, so that page and picture can be
made from the committed JSON alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.calls import (
    Call,
    Memory,
    acceptance_length,
    decode_speedup,
    estimate,
    identical,
    shown,
    step_cost,
)
from benchmarks.report import (
    COLORS,
    Table,
    join_tables,
    legend,
    means_and_errors,
    picture,
    published,
)
from benchmarks.trees import PARTS, Draft, Part

CAPTIONING = "captioning"
SIZE_INCHES = (15, 6)
TITLES: Mapping[str, str] = {
    Part.POLICIES: "policies, batch 1, greedy",
    Part.NODES: "nodes, batch 1, greedy",
    Part.BATCH: "batches, greedy",
    Part.TEMPERATURE: "temperature 1, batch 1",
    Part.DRAFT_VLM: "draft VLM, batch 1, greedy",
    Part.DRAFT_VLM_BATCH: "draft VLM, batches, greedy",
    Part.SIBLING: "untrained sibling beside the head, batch 1, greedy",
    Part.THRESHOLDS: "thresholds of single paths, greedy",
}
COST = "step_cost_over_plain_pass"
HEADING = (
    "acceptance_length",
    "decode_speedup",
    CAPTIONING,
    "step / plain pass",
    "step / chain's",
    "KV cache",
    "buffers",
    "identical",
)
Row = Mapping[str, Any]
Rows = Sequence[Row]


def make_row(part: Part, draft: Draft, calls: Sequence[Call], memory: Memory | None) -> Row:
    """Sum up calls of one size."""
    families = sorted({family for call in calls for family in call.families})
    alone = {name: [c for c in calls if set(c.families) == {name}] for name in families}
    return {
        "part": part.value,
        **draft.to_json(),
        "temperature": PARTS[part][0].temperature,
        "batch": calls[0].batch,
        "acceptance_length": estimate([calls], acceptance_length),
        "decode_speedup": estimate([calls], decode_speedup),
        COST: step_cost(calls),
        "by_family": {
            name: {
                "acceptance_length": acceptance_length(some),
                "decode_speedup": decode_speedup(some),
            }
            for name, some in alone.items()
            if some
        },
        "identical": identical(calls),
        "memory": asdict(memory) if memory else None,
    }


def _of(rows: Rows, *parts: str) -> list[Row]:
    return [row for row in rows if row["part"] in parts]


def _tokens(row: Row) -> float:
    return float(row["acceptance_length"]["mean"])


def _speed(row: Row) -> float:
    return float(row["decode_speedup"]["mean"])


def _trees(rows: Rows) -> list[Row]:
    return [row for row in rows if "tree" in row]


def _chains(rows: Rows) -> list[Row]:
    return [row for row in rows if "tree" not in row]


def _fastest_chain(rows: Rows, batch: int) -> Row | None:
    here = [row for row in _chains(rows) if row["batch"] == batch]
    return max(here, key=_speed, default=None)


def _same_depth(rows: Rows) -> Iterator[tuple[Row, Row]]:
    """Trees with the chain at their batch size whose K is the longest path of the tree."""
    chains = {(row["batch"], row["num_speculative_tokens"]): row for row in _chains(rows)}
    for tree in _trees(rows):
        if (chain := chains.get((tree["batch"], tree["levels"]))) is not None:
            yield tree, chain


def find_losses(rows: Rows) -> list[list[str]]:
    """Return where trees are slower than the fastest chain: tree, chain, where, ratio."""
    losses = []
    policies = _of(rows, Part.POLICIES)
    if best := _fastest_chain(policies, 1):
        for tree in _trees(policies):
            ratios = {
                family: found["decode_speedup"] / best["by_family"][family]["decode_speedup"]
                for family, found in tree["by_family"].items()
                if family in best["by_family"]
            }
            lost = [f"{family} {ratio:.2f}" for family, ratio in ratios.items() if ratio < 1]
            if lost:
                losses.append(_loss(tree, best, ", ".join(lost)))
    for part in (Part.BATCH, Part.DRAFT_VLM_BATCH):
        here = _of(rows, part)
        for tree in _trees(here):
            chain = _fastest_chain(here, tree["batch"])
            if chain and _speed(tree) < _speed(chain):
                losses.append(_loss(tree, chain, f"batch {tree['batch']}"))
    return losses


def _loss(tree: Row, chain: Row, where: str) -> list[str]:
    return [tree["label"], chain["label"], where, f"{_speed(tree) / _speed(chain):.2f}"]


# The page


def to_markdown(content: Mapping[str, Any]) -> str:
    """All tables for which the result file has numbers."""
    rows: Rows = content["results"]
    tables: list[Table] = []
    for part, (condition, _) in PARTS.items():
        make = _batch_table if condition.has_batches else _alone_table
        tables.append(make(TITLES[part], _of(rows, part)))
    tables += [
        _family_table(_of(rows, Part.POLICIES)),
        [["where the tree loses", "to", "at", "decode_speedup, ratio"], *find_losses(rows)],
        [["published", "setting", "speedup", "acceptance_length", "from"], *published("trees")],
    ]
    return join_tables(("", table) for table in tables)


def _identical(row: Row) -> str:
    return "" if row["identical"] is None else "{}/{}".format(*row["identical"])


def _alone_table(title: str, rows: Rows) -> Table:
    ratios = {tree["name"]: tree[COST] / chain[COST] for tree, chain in _same_depth(rows)}
    table = [[title, *HEADING]]
    for row in rows:
        captioning, memory = row["by_family"].get(CAPTIONING), row["memory"]
        table.append(
            [
                row["label"],
                shown(row["acceptance_length"]),
                shown(row["decode_speedup"]),
                f"{captioning['decode_speedup']:.2f}" if captioning else "",
                f"{row[COST]:.2f}",
                f"{ratios[row['name']]:.2f}" if row["name"] in ratios else "",
                f"+{memory['kv_percent']:.1f} %" if memory else "",
                f"{memory['buffers_mib']:.1f} MiB" if memory else "",
                _identical(row),
            ]
        )
    return table


def _batch_table(title: str, rows: Rows) -> Table:
    """A line for every draft and number, a column for every batch size."""
    sizes = sorted({row["batch"] for row in rows})
    table = [[title, "", *map(str, sizes)]]
    numbers = {
        "acceptance_length": lambda row: f"{_tokens(row):.2f}",
        "decode_speedup": lambda row: f"{_speed(row):.2f}",
        "step / plain pass": lambda row: f"{row[COST]:.2f}",
        "identical": _identical,
    }
    for label in dict.fromkeys(row["label"] for row in rows):
        by_size = {row["batch"]: row for row in rows if row["label"] == label}
        for name, number in numbers.items():
            cells = [number(by_size[size]) if size in by_size else "" for size in sizes]
            table.append([label, name, *cells])
    return table


def _family_table(rows: Rows) -> Table:
    families = list(dict.fromkeys(family for row in rows for family in row["by_family"]))
    table = [["acceptance_length / decode_speedup", *families]]
    for row in rows:
        found = [row["by_family"].get(family) for family in families]
        cells = [
            f"{one['acceptance_length']:.2f} / {one['decode_speedup']:.2f}" if one else ""
            for one in found
        ]
        table.append([row["label"], *cells])
    return table


# The picture


def draw(content: Mapping[str, Any], file: Path) -> None:
    """Draw decode_speedup by policy, numbers over nodes, and decode_speedup over batches."""
    rows: Rows = content["results"]
    with picture(file, SIZE_INCHES) as figure:
        left, middle, right = figure.subplots(1, 3, width_ratios=(4, 3, 3))
        _bars(left, _of(rows, Part.POLICIES))
        _nodes(middle, _trees(_of(rows, Part.NODES)))
        _batches(right, _of(rows, Part.BATCH))


def _bars(axes: Any, rows: Rows) -> None:
    """Both numbers of every draft, on one scale: their gap is what steps cost."""
    kinds = (("acceptance_length", -0.2), ("decode_speedup", 0.2))
    for (name, shift), color in zip(kinds, COLORS, strict=False):
        means, errors = means_and_errors([row[name] for row in rows])
        places = [place + shift for place in range(len(rows))]
        axes.barh(places, means, 0.38, label=name, color=color, xerr=errors, capsize=2)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("batch 1, greedy (95 % interval)")
    legend(axes)


def _nodes(axes: Any, rows: Rows) -> None:
    nodes = [row["num_speculative_tokens"] for row in rows]
    for name, color in zip(("acceptance_length", "decode_speedup"), COLORS, strict=False):
        means, errors = means_and_errors([row[name] for row in rows])
        axes.errorbar(nodes, means, yerr=errors, marker="o", capsize=3, color=color, label=name)
    costs = [row[COST] for row in rows]
    axes.plot(nodes, costs, marker="s", color=COLORS[2], label="step / plain pass")
    axes.set_xticks(nodes)
    axes.set_xlabel("nodes (num_speculative_tokens), batch 1, greedy")
    legend(axes)


def _batches(axes: Any, rows: Rows) -> None:
    for label, color in zip(dict.fromkeys(row["label"] for row in rows), COLORS, strict=False):
        mine = [row for row in rows if row["label"] == label]
        sizes = [row["batch"] for row in mine]
        axes.plot(sizes, [_speed(row) for row in mine], marker="o", color=color, label=label)
    axes.axhline(1.0, color="#777777", linestyle="--", linewidth=1)
    if rows:
        axes.set_xscale("log", base=2)
        sizes = sorted({row["batch"] for row in rows})
        axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("requests at a time (greedy)")
    axes.set_ylabel("decode_speedup over plain vLLM at the same batch")
    # Below: names are longer than the axes are wide.
    legend(axes, loc="upper center", bbox_to_anchor=(0.5, -0.12))
