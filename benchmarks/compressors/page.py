"""The tables and the picture of the page on compressors: ours beside the paper's, and costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.answers import IMAGES, shown
from benchmarks.compressors.findings import IMAGE_TOKENS, best_known
from benchmarks.compressors.variants import (
    REFERENCE,
    SCALING,
    SOURCE,
    SWEEPS,
    TABLE_3,
    TABLE_4,
    TABLE_7,
    VARIANTS,
    Reported,
)
from benchmarks.report import COLORS, error_bars, legend, markdown_table, new_figure, save
from benchmarks.study import EPOCHS
from examples.tiny_vlm.families import FAMILIES
from vllm_vispec.compressors.spec import PRIMITIVES

SIZE_INCHES = (13, 4.5)
COMBINATIONS = (REFERENCE, "weighted", "concat", "select")
OTHERS = ("eagle_vlm_no_norm", "text_only", "adaptor", "adaptor_global", "select_global")
NUMBERS = (
    "replayed",
    "over EagleVLM",
    "in the engine",
    "over EagleVLM",
    "decode_speedup",
    "identical",
    "paper: speedup/tokens per round",
)
Finding = Mapping[str, Any]
Findings = Sequence[Finding]
Table = list[list[str]]


def to_markdown(content: Mapping[str, Any]) -> str:
    """Every table that has a row, with its title."""
    tables: Mapping[str, Callable[[Findings], Table]] = {
        f"Combinations ({SOURCE}, table 3: six data sets, MI250, 1 epoch)": _combinations,
        f"One primitive at a time ({SOURCE}, table 4: LLaVA-Wild, 1 epoch)": _sweep_table,
        f"Epochs: acceptance_length ({SOURCE}, table 7: LLaVA-Wild, MI250)": _scaling,
        "What a head keeps of an image, and computes": _costs,
        "The draft's part of a prefill, measured": _prefill,
        "What the gates choose on held-out questions": _gates,
        "acceptance_length by task family, in the engine": _families,
    }
    found = {title: make(content["rows"]) for title, make in tables.items()}
    return "\n\n".join(
        f"## {title}\n\n{markdown_table(rows)}" for title, rows in found.items() if len(rows) > 1
    )


def _variant_of(finding: Finding) -> str:
    name: str = finding["name"]
    return name.rsplit("-e", 1)[0]


def _main(findings: Findings) -> dict[str, Finding]:
    """By variant, those after as many epochs as all variants were trained for."""
    return {_variant_of(one): one for one in findings if one["epochs"] == EPOCHS}


def _paper(reported: Reported | None) -> str:
    return "{:.2f}/{:.2f}".format(*reported) if reported else ""


def _numbers(one: Finding, paper: Reported | None) -> list[str]:
    cells = [shown(one["replayed"]), shown(one["replayed_ratio"])]
    engine = one["engine"]
    if engine is None:
        return [*cells, "", "", "", "", _paper(paper)]
    return [
        *cells,
        shown(engine["acceptance_length"][IMAGES]),
        shown(engine["acceptance_length_ratio"]),
        shown(engine["decode_speedup"][IMAGES]),
        f"{engine['identical']}/{engine['answers_compared']}",
        _paper(paper),
    ]


def _combinations(findings: Findings) -> Table:
    known = _main(findings)
    return [["acceptance_length of", *NUMBERS]] + [
        [known[name]["label"], *_numbers(known[name], TABLE_3.get(name))]
        for name in (*COMBINATIONS, *OTHERS)
        if name in known
    ]


def _sweep_table(findings: Findings) -> Table:
    known = _main(findings)
    return [["acceptance_length of", *NUMBERS]] + [
        [one["label"], *_numbers(one, TABLE_4[name][amount])]
        for name, amounts in SWEEPS.items()
        for amount in amounts
        if (one := known.get(f"{name}_{amount}"))
    ]


def _scaling(findings: Findings) -> Table:
    found = {(_variant_of(one), one["epochs"]): one for one in findings}
    names = [
        name
        for name in dict.fromkeys(name for name, _ in found)
        if VARIANTS[name].epochs == SCALING
    ]
    rows = [["epochs", *(f"{VARIANTS[n].label}: replayed, speedup/engine" for n in names)]]
    rows[0] += ["paper: EagleVLM", "paper: SpecVLM"]
    for epochs in SCALING:
        ours = [found.get((name, epochs)) for name in names]
        if any(ours):
            paper = [_paper(column[epochs]) for column in TABLE_7.values()]
            rows.append([str(epochs), *map(_by_epoch, ours), *paper])
    return rows


def _by_epoch(one: Finding | None) -> str:
    if one is None:
        return ""
    parts = [shown(one["replayed"])] if one["replayed"] else []
    if one["engine"]:
        # In the paper's form: speedup/acceptance length.
        speedup, tokens = (
            one["engine"][n][IMAGES] for n in ("decode_speedup", "acceptance_length")
        )
        parts.append(_paper((speedup["mean"], tokens["mean"])))
    return ", ".join(parts)


def _costs(findings: Findings) -> Table:
    rows = [["head", "weights for images", *(f"KV tokens of {size}" for size in IMAGE_TOKENS)]]
    rows[0] += [f"MFLOPs of {size}" for size in IMAGE_TOKENS]
    for one in _main(findings).values():
        costs = one["image_cost"]
        flops = [f"{cost['megaflops']:.1f}" for cost in costs]
        kept = [_kept(cost["kv_tokens"], *cost["seen"]) for cost in costs]
        rows.append([one["label"], f"{one['parameters_for_images']:,}", *kept, *flops])
    return rows


def _kept(kept: int, fewest: int, most: int) -> str:
    return str(kept) if fewest == kept else f"{kept}, seen {fewest} to {most}"


def _prefill(findings: Findings) -> Table:
    rows = [["head", *(f"{size}: ms" for size in IMAGE_TOKENS)]]
    rows[0] += [f"{size}: over EagleVLM" for size in IMAGE_TOKENS]
    for one in _main(findings).values():
        if found := one["draft_prefill"]:
            times = [f"{1000 * part['seconds']:.1f}" for part in found]
            ratios = [f"{p['ratio']:.2f} ({p['low']:.2f}-{p['high']:.2f})" for p in found]
            rows.append([one["label"], *times, *ratios])
    return rows


def _gates(findings: Findings) -> Table:
    rows = [["head", "questions", "branch: times chosen (mean share)"]]
    for one in findings:
        if families := one["choices"]:
            weights = [sum(family["counts"]) for family in families]
            total = sum(weights)
            counts = [sum(c) for c in zip(*(f["counts"] for f in families), strict=True)]
            shares = [
                sum(w * s for w, s in zip(weights, column, strict=True)) / total
                for column in zip(*(f["shares"] for f in families), strict=True)
            ]
            parts = zip(families[0]["branches"], counts, shares, strict=True)
            text = ", ".join(f"{name}: {count} ({share:.2f})" for name, count, share in parts)
            rows.append([f"{one['label']}, epoch {one['epochs']}", str(total), text])
    return rows


def _families(findings: Findings) -> Table:
    rows = [["head", *FAMILIES]]
    for one in _main(findings).values():
        if one["engine"]:
            numbers = one["engine"]["acceptance_length"]
            rows.append([one["label"], *(shown(numbers[name]) for name in FAMILIES)])
    return rows


def draw(content: Mapping[str, Any], file: Path) -> None:
    """Draw acceptance_length on the image tasks: over ratios, over queries, over epochs."""
    findings: Findings = content["rows"]
    figure = new_figure(SIZE_INCHES)
    ratios, queries, epochs = figure.subplots(1, 3, sharey=True)
    known = _main(findings)
    for axes, kind in ((ratios, "ratio"), (queries, "queries")):
        _draw_sweeps(axes, kind, known)
    for color, name in zip(
        COLORS, (n for n, v in VARIANTS.items() if v.epochs == SCALING), strict=False
    ):
        there = [one for one in findings if _variant_of(one) == name]
        _curve(epochs, [one["epochs"] for one in there], there, VARIANTS[name].label, color)
    epochs.set_xticks(SCALING)
    epochs.set_xlabel("epochs")
    legend(epochs)
    ratios.set_ylabel("acceptance_length, image tasks (95 % interval)")
    save(figure, file)


def _draw_sweeps(axes: Any, kind: str, known: Mapping[str, Finding]) -> None:
    names = [name for name in SWEEPS if PRIMITIVES[name].amount == kind]
    for color, name in zip(COLORS, names, strict=False):
        there = {n: known[f"{name}_{n}"] for n in SWEEPS[name] if f"{name}_{n}" in known}
        _curve(axes, list(there), there.values(), name, color)
        axes.set_xticks(SWEEPS[name])
    if level := best_known(known[REFERENCE]) if REFERENCE in known else None:
        axes.axhline(level["mean"], color="#777777", linestyle="--", linewidth=1, label="EagleVLM")
    axes.set_xlabel(kind)
    legend(axes)


def _curve(
    axes: Any, places: Sequence[int], findings: Iterable[Finding], label: str, color: str
) -> None:
    found = [one for one in map(best_known, findings) if one is not None]
    if found:
        means, bars = [one["mean"] for one in found], error_bars(found)
        axes.errorbar(places, means, yerr=bars, marker="o", capsize=3, color=color, label=label)
