"""Rows of the result file, what they say about the goals, and the tables and picture of the page.

A row is plain data, a draft under a condition and at a batch size, so that page and picture can be
made from the committed JSON alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import turns
from benchmarks.report import COLORS, error_bars, legend, markdown_table, new_figure, save
from benchmarks.trees.grid import PARTS, VISPEC, Draft, Part
from benchmarks.trees.measure import Bench, Measured
from benchmarks.turns import Call, Memory, estimate

CAPTIONING = "captioning"
TOKENS_GOAL, SPEEDUP_GOAL, STRETCH_GOAL = 1.25, 3.0, 3.3
SIZE_INCHES = (15, 6)
TITLES: Mapping[str, str] = {
    Part.POLICIES: "policies, batch 1, greedy",
    Part.NODES: "nodes, batch 1, greedy",
    Part.BATCH: "batches, greedy",
    Part.TEMPERATURE: "temperature 1, batch 1",
    Part.DRAFT_VLM: "draft VLM, batch 1, greedy",
    Part.DRAFT_VLM_BATCH: "draft VLM, batches, greedy",
}
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
# Published figures: other targets, machines and questions. ViSpec counts accepted draft tokens
# alone; one is added here. Its speedups are ratios of tokens per second.
_TREE = "tree of 30, depth 3, top-k 8"
_SUMMARY, _README = "summaries of the paper", "the repository's tables"
PUBLISHED: tuple[tuple[str, str, str, float, float | None, str], ...] = (
    ("Spec-LLaVA", "2509.11961", "LLaVA-1.5-7B, T = 0, best", 3.28, None, _SUMMARY),
    ("Spec-LLaVA", "2509.11961", "LLaVA-1.5-13B, T = 0, best", 2.95, None, _SUMMARY),
    ("ViSpec", "2509.15235", f"LLaVA-1.6-7B, COCO, T = 0, {_TREE}", 3.22, 4.30, _README),
    ("ViSpec", "2509.15235", "LLaVA-1.6-7B, mean of 8 sets, T = 0", 2.58, 3.98, _README),
    ("ViSpec", "2509.15235", "LLaVA-1.6-7B, mean of 8 sets, T = 1", 2.14, 3.09, _README),
    ("ViSpec", "2509.15235", "Qwen2.5-VL-7B, mean of 8 sets, T = 0", 1.80, 3.24, _README),
    ("ViSpec", "2509.15235", "Qwen2.5-VL-7B, mean of 8 sets, T = 1", 1.49, 2.66, _README),
)

Row = Mapping[str, Any]
Rows = Sequence[Row]


def read_rows(bench: Bench) -> list[Row]:
    """Rows of every part, as far as it was measured."""
    found = []
    for part, (condition, drafts) in PARTS.items():
        for draft in drafts:
            file = bench.file(condition, draft)
            if not file.is_file():
                continue
            measured = Measured.read(file)
            for batch in sorted({call.batch for call in measured.calls}):
                calls = [call for call in measured.calls if call.batch == batch]
                found.append(make_row(part, draft, calls, measured.memory))
    return found


def make_row(part: Part, draft: Draft, calls: Sequence[Call], memory: Memory | None) -> Row:
    """Sum up calls of one size."""
    families = sorted({family for call in calls for family in call.families})
    alone = {name: [c for c in calls if set(c.families) == {name}] for name in families}
    return {
        "part": part.value,
        **draft.to_json(),
        "temperature": PARTS[part][0].temperature,
        "batch": calls[0].batch,
        "acceptance_length": asdict(estimate(calls, turns.acceptance_length)),
        "decode_speedup": asdict(estimate(calls, turns.decode_speedup)),
        "step_cost_over_plain_pass": turns.step_cost(calls),
        "by_family": {
            name: {
                "acceptance_length": turns.acceptance_length(some),
                "decode_speedup": turns.decode_speedup(some),
            }
            for name, some in alone.items()
            if some
        },
        "identical": turns.identical(calls),
        "memory": asdict(memory) if memory else None,
    }


def _of(rows: Rows, *parts: str) -> list[Row]:
    return [row for row in rows if row["part"] in parts]


def _tokens(row: Row) -> float:
    return float(row["acceptance_length"]["value"])


def _speed(row: Row) -> float:
    return float(row["decode_speedup"]["value"])


def _is_tree(row: Row) -> bool:
    return "tree" in row


def _chains(rows: Rows) -> list[Row]:
    return [row for row in rows if not _is_tree(row)]


def _fastest(rows: Rows) -> Row:
    return max(_chains(rows), key=_speed)


def _same_depth(rows: Rows) -> Iterator[tuple[Row, Row]]:
    """Trees with the chain whose K is the longest path of the tree."""
    chains = {row["num_speculative_tokens"]: row for row in _chains(rows)}
    for row in rows:
        if _is_tree(row) and row["levels"] in chains:
            yield row, chains[row["levels"]]


def _by_batch(ratios: Mapping[int, float]) -> str:
    return ", ".join(f"batch {batch}: {ratio:.2f}" for batch, ratio in sorted(ratios.items()))


def find_goals(rows: Rows) -> list[dict[str, Any]]:
    """Goals for which there are numbers: text, value, whether it is met, and where it was found."""
    goals: list[dict[str, Any]] = []
    for part, whose in ((Part.POLICIES, ""), (Part.DRAFT_VLM, ", draft VLM")):
        goals += _acceptance_goal(_of(rows, part), whose)
    for least in (SPEEDUP_GOAL, STRETCH_GOAL):
        goals += _captioning_goal(_of(rows, Part.POLICIES, Part.NODES), least)
    for part in (Part.BATCH, Part.DRAFT_VLM_BATCH):
        goals += _load_goals(_of(rows, part))
    return goals


def _goal(text: str, value: float, met: bool, found: str) -> dict[str, Any]:
    return {"text": text, "value": value, "met": met, "found": found}


def _acceptance_goal(rows: Rows, whose: str) -> Iterator[dict[str, Any]]:
    pairs = list(_same_depth(rows))
    if not pairs:
        return
    tree, chain = max(pairs, key=lambda pair: _tokens(pair[0]) / _tokens(pair[1]))
    ratio = _tokens(tree) / _tokens(chain)
    # Nothing a tree of this depth does can reach more.
    most = (tree["levels"] + 1) / _tokens(chain)
    yield _goal(
        f"acceptance_length of a tree >= {TOKENS_GOAL} x the chain's at the same depth, "
        f"best tree{whose}",
        ratio,
        ratio >= TOKENS_GOAL,
        f"{tree['label']}: {_tokens(tree):.2f}, {chain['label']}: {_tokens(chain):.2f}; "
        f"with every draft token accepted {most:.2f}",
    )


def _captioning_goal(rows: Rows, least: float) -> Iterator[dict[str, Any]]:
    found = [
        (float(row["by_family"][CAPTIONING]["decode_speedup"]), row["label"])
        for row in rows
        if _is_tree(row) and row["tree"]["top_k"] > 1 and row["head"] == VISPEC
        if CAPTIONING in row["by_family"]
    ]
    if found:
        speedup, label = max(found, key=lambda pair: pair[0])
        text = f"decode_speedup > {least} over plain vLLM on {CAPTIONING}, batch 1, "
        yield _goal(text + "best branching tree", speedup, speedup > least, label)


def _load_goals(rows: Rows) -> Iterator[dict[str, Any]]:
    """For every tree with a schedule: against the chain as deep, and against the fastest one."""
    for label in dict.fromkeys(row["label"] for row in rows if "load schedule" in row["label"]):
        mine = {row["batch"]: row for row in rows if row["label"] == label}
        levels = next(iter(mine.values()))["levels"]
        deep = {r["batch"]: r for r in _chains(rows) if r["num_speculative_tokens"] == levels}
        ratios = {b: _speed(mine[b]) / _speed(deep[b]) for b in mine if b in deep}
        if not ratios:
            continue
        fastest = {
            batch: _speed(mine[batch]) / _speed(_fastest([r for r in rows if r["batch"] == batch]))
            for batch in ratios
        }
        yield _goal(
            "decode_speedup with a load schedule >= the chain's as deep at every batch size: "
            f"{label}",
            min(ratios.values()),
            min(ratios.values()) >= 1,
            f"{_by_batch(ratios)}; over the fastest chain measured there: {_by_batch(fastest)}",
        )


def find_losses(rows: Rows) -> list[dict[str, Any]]:
    """Where trees are slower than the fastest chain: by family at batch 1, and by batch size."""
    policies = _of(rows, Part.POLICIES)
    losses = list(_lost_families(policies)) if _chains(policies) else []
    for part in (Part.BATCH, Part.DRAFT_VLM_BATCH):
        losses += _lost_batches(_of(rows, part))
    return losses


def _loss(tree: Row, chain: Row, where: str) -> dict[str, Any]:
    ratio = _speed(tree) / _speed(chain)
    return {"tree": tree["label"], "chain": chain["label"], "where": where, "ratio": ratio}


def _lost_families(rows: Rows) -> Iterator[dict[str, Any]]:
    best = _fastest(rows)
    for tree in filter(_is_tree, rows):
        ratios = {
            family: found["decode_speedup"] / best["by_family"][family]["decode_speedup"]
            for family, found in tree["by_family"].items()
            if family in best["by_family"]
        }
        lost = [f"{family} {ratio:.2f}" for family, ratio in ratios.items() if ratio < 1]
        if lost:
            yield _loss(tree, best, ", ".join(lost))


def _lost_batches(rows: Rows) -> Iterator[dict[str, Any]]:
    measured = {row["batch"] for row in _chains(rows)}
    for tree in rows:
        if _is_tree(tree) and tree["batch"] in measured:
            chain = _fastest([row for row in rows if row["batch"] == tree["batch"]])
            if _speed(tree) < _speed(chain):
                yield _loss(tree, chain, f"batch {tree['batch']}")


# The page


def to_markdown(content: Mapping[str, Any]) -> str:
    """All tables for which the result file has numbers."""
    rows: Rows = content["results"]
    goals = [
        [goal["text"], f"{goal['value']:.2f}", "yes" if goal["met"] else "no", goal["found"]]
        for goal in find_goals(rows)
    ]
    tables = [[["goal", "measured", "met", "by"], *goals]]
    for part, (condition, _) in PARTS.items():
        make = _batch_table if condition.has_batches else _alone_table
        tables.append(make(TITLES[part], _of(rows, part)))
    losses = [
        [one["tree"], one["chain"], one["where"], f"{one['ratio']:.2f}"]
        for one in find_losses(rows)
    ]
    tables += [
        _family_table(_of(rows, Part.POLICIES)),
        [["where the tree loses", "to", "at", "decode_speedup, ratio"], *losses],
        [["published", "setting", "speedup", "acceptance_length", "from"], *_published()],
    ]
    return "\n\n".join(markdown_table(table) for table in tables if len(table) > 1)


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['value']:.2f} ({found['low']:.2f}-{found['high']:.2f})"


def _identical(row: Row) -> str:
    return "" if row["identical"] is None else "{}/{}".format(*row["identical"])


def _alone_table(title: str, rows: Rows) -> list[list[str]]:
    cost = "step_cost_over_plain_pass"
    ratios = {tree["name"]: tree[cost] / chain[cost] for tree, chain in _same_depth(rows)}
    table = [[title, *HEADING]]
    for row in rows:
        captioning = row["by_family"].get(CAPTIONING)
        memory = row["memory"]
        table.append(
            [
                row["label"],
                _interval(row["acceptance_length"]),
                _interval(row["decode_speedup"]),
                f"{captioning['decode_speedup']:.2f}" if captioning else "",
                f"{row[cost]:.2f}",
                f"{ratios[row['name']]:.2f}" if row["name"] in ratios else "",
                f"+{memory['kv_percent']:.1f} %" if memory else "",
                f"{memory['buffers_mib']:.1f} MiB" if memory else "",
                _identical(row),
            ]
        )
    return table


def _batch_table(title: str, rows: Rows) -> list[list[str]]:
    """A line for every draft and number, a column for every batch size."""
    sizes = sorted({row["batch"] for row in rows})
    table = [[title, "", *map(str, sizes)]]
    numbers = {
        "acceptance_length": lambda row: f"{_tokens(row):.2f}",
        "decode_speedup": lambda row: f"{_speed(row):.2f}",
        "step / plain pass": lambda row: f"{row['step_cost_over_plain_pass']:.2f}",
        "identical": _identical,
    }
    for label in dict.fromkeys(row["label"] for row in rows):
        by_size = {row["batch"]: row for row in rows if row["label"] == label}
        for name, number in numbers.items():
            cells = [number(by_size[size]) if size in by_size else "" for size in sizes]
            table.append([label, name, *cells])
    return table


def _family_table(rows: Rows) -> list[list[str]]:
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


def _published() -> Iterable[list[str]]:
    for system, arxiv, setting, speedup, tokens, source in PUBLISHED:
        shown = "" if tokens is None else f"{tokens:.2f}"
        yield [f"{system}, arXiv {arxiv}", setting, f"{speedup:.2f}", shown, source]


# The picture


def draw(content: Mapping[str, Any], file: Path) -> None:
    """Draw decode_speedup by policy, numbers over nodes, and decode_speedup over batches."""
    rows: Rows = content["results"]
    figure = new_figure(SIZE_INCHES)
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 3, 3))
    _bars(left, _of(rows, Part.POLICIES))
    _nodes(middle, [row for row in _of(rows, Part.NODES) if _is_tree(row)])
    _batches(right, _of(rows, Part.BATCH))
    save(figure, file)


def _bars(axes: Any, rows: Rows) -> None:
    """Both numbers of every draft, on one scale: their gap is what steps cost."""
    kinds = (("acceptance_length", -0.2), ("decode_speedup", 0.2))
    for (name, shift), color in zip(kinds, COLORS, strict=False):
        found = [row[name] for row in rows]
        places, values = [p + shift for p in range(len(rows))], [one["value"] for one in found]
        bars = {"xerr": error_bars(found), "capsize": 2}
        axes.barh(places, values, 0.38, label=name, color=color, **bars)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("batch 1, greedy (95 % interval)")
    legend(axes)


def _nodes(axes: Any, rows: Rows) -> None:
    nodes = [row["num_speculative_tokens"] for row in rows]
    for name, color in zip(("acceptance_length", "decode_speedup"), COLORS, strict=False):
        found = [row[name] for row in rows]
        curve = {"yerr": error_bars(found), "marker": "o", "capsize": 3}
        axes.errorbar(nodes, [one["value"] for one in found], color=color, label=name, **curve)
    costs = [row["step_cost_over_plain_pass"] for row in rows]
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
