"""Tables of the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.report import markdown_table
from benchmarks.trees.goals import Goal, Loss, find_goals, find_losses, same_depth
from benchmarks.trees.grid import PARTS, Part
from benchmarks.trees.published import PUBLISHED
from benchmarks.trees.results import CAPTIONING, Row, Rows

Table = list[list[str]]
TITLES: Mapping[Part, str] = {
    Part.POLICIES: "policies, batch 1, greedy",
    Part.NODES: "nodes, batch 1, greedy",
    Part.BATCH: "batches, greedy",
    Part.TEMPERATURE: "temperature 1, batch 1",
    Part.DRAFT_VLM: "draft VLM, batch 1, greedy",
    Part.DRAFT_VLM_BATCH: "draft VLM, batches, greedy",
}
_HEADING = (
    "tokens_per_round",
    "decode_speedup",
    CAPTIONING,
    "round / plain pass",
    "round / chain's",
    "KV cache",
    "buffers",
    "identical",
)


def to_markdown(rows: Rows) -> str:
    """All tables for which there are numbers."""
    tables = [_goals(find_goals(rows))]
    for part, title in TITLES.items():
        make = _batches if PARTS[part].condition.has_batches else _alone
        tables.append(make(title, rows[part]))
    tables += [_families(rows[Part.POLICIES]), _losses(find_losses(rows)), _published()]
    return "\n\n".join(markdown_table(table) for table in tables if len(table) > 1)


def _goals(goals: Sequence[Goal]) -> Table:
    table = [["goal", "measured", "met", "by"]]
    for goal in goals:
        table.append([goal.text, f"{goal.value:.2f}", "yes" if goal.met else "no", goal.found])
    return table


def _alone(title: str, rows: Sequence[Row]) -> Table:
    costs = {tree.draft: tree.round_cost / chain.round_cost for tree, chain in same_depth(rows)}
    table = [[title, *_HEADING]]
    for row in rows:
        captioning = row.speedup_in(CAPTIONING)
        table.append(
            [
                row.draft.label,
                str(row.tokens_per_round),
                str(row.decode_speedup),
                "" if captioning is None else f"{captioning:.2f}",
                f"{row.round_cost:.2f}",
                f"{costs[row.draft]:.2f}" if row.draft in costs else "",
                *_memory(row),
                _identical(row),
            ]
        )
    return table


def _memory(row: Row) -> tuple[str, str]:
    if row.memory is None:
        return "", ""
    return f"+{row.memory.kv_percent:.1f} %", f"{row.memory.buffers_mib:.1f} MiB"


def _identical(row: Row) -> str:
    return "" if row.identical is None else "{}/{}".format(*row.identical)


def _batches(title: str, rows: Sequence[Row]) -> Table:
    """A line for every draft and number, a column for every batch size."""
    sizes = sorted({row.batch for row in rows})
    table = [[title, "", *(str(size) for size in sizes)]]
    numbers: tuple[tuple[str, Callable[[Row], str]], ...] = (
        ("tokens_per_round", lambda row: f"{row.tokens_per_round.value:.2f}"),
        ("decode_speedup", lambda row: f"{row.decode_speedup.value:.2f}"),
        ("round / plain pass", lambda row: f"{row.round_cost:.2f}"),
        ("identical", _identical),
    )
    for draft in dict.fromkeys(row.draft for row in rows):
        by_size = {row.batch: row for row in rows if row.draft == draft}
        for name, number in numbers:
            cells = [number(by_size[size]) if size in by_size else "" for size in sizes]
            table.append([draft.label, name, *cells])
    return table


def _families(rows: Sequence[Row]) -> Table:
    families = list(dict.fromkeys(family for row in rows for family in row.by_family))
    table = [["tokens_per_round / decode_speedup", *families]]
    for row in rows:
        found = [row.by_family.get(family) for family in families]
        table.append(
            [
                row.draft.label,
                *("" if one is None else f"{one[0]:.2f} / {one[1]:.2f}" for one in found),
            ]
        )
    return table


def _losses(losses: Sequence[Loss]) -> Table:
    table = [["where the tree loses", "to", "at", "decode_speedup, ratio"]]
    return table + [[one.tree, one.chain, one.where, f"{one.ratio:.2f}"] for one in losses]


def _published() -> Table:
    table = [["published", "setting", "speedup", "tokens_per_round", "from"]]
    for one in PUBLISHED:
        tokens = "" if one.tokens_per_round is None else f"{one.tokens_per_round:.2f}"
        name = f"{one.system}, arXiv {one.arxiv}"
        table.append([name, one.setting, f"{one.speedup:.2f}", tokens, one.source])
    return table
