"""The tables and the picture of the page on compressors: ours beside the paper's, and costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.answers import IMAGES
from benchmarks.calls import shown
from benchmarks.compressors import REFERENCE, SCALING, SWEEPS, VARIANTS
from benchmarks.compressors.findings import IMAGE_TOKENS
from benchmarks.report import (
    COLORS,
    Table,
    join_tables,
    legend,
    means_and_errors,
    picture,
    published,
)
from benchmarks.study import EPOCHS
from examples.tiny_vlm.families import FAMILIES
from vllm_vispec.compressors.spec import PRIMITIVES

SIZE_INCHES = (13, 4.5)
PAPER = published("specvlm")
COMBINATIONS = (REFERENCE, "weighted", "concat", "select")
OTHERS = ("eagle_vlm_no_norm", "text_only", "adaptor", "adaptor_global", "select_global")
NUMBERS = [
    "acceptance_length of",
    "replayed",
    "over EagleVLM",
    "in the engine",
    "over EagleVLM",
    "decode_speedup",
    "identical",
    "paper: speedup/tokens per round",
]
Finding = Mapping[str, Any]
Findings = Sequence[Finding]


def to_markdown(content: Mapping[str, Any]) -> str:
    """Every table that has a row, with its title."""
    findings: Findings = content["rows"]
    main, source = _main(findings), PAPER["source"]
    combined = [
        _numbers(main[name], PAPER["combinations"].get(name))
        for name in (*COMBINATIONS, *OTHERS)
        if name in main
    ]
    swept = [
        _numbers(main[f"{name}_{amount}"], PAPER["primitives"][name][amount])
        for name, amounts in SWEEPS.items()
        for amount in amounts
        if f"{name}_{amount}" in main
    ]
    costs = [
        [one["label"], f"{one['parameters_for_images']:,}"]
        + [_kept(cost["kv_tokens"], *cost["seen"]) for cost in one["image_cost"]]
        + [f"{cost['megaflops']:.1f}" for cost in one["image_cost"]]
        for one in main.values()
    ]
    families = [
        [one["label"], *(shown(one["engine"]["acceptance_length"][name]) for name in FAMILIES)]
        for one in main.values()
        if one["engine"]
    ]
    cost_head = [
        "head",
        "weights for images",
        *_by_size("KV tokens of {}"),
        *_by_size("MFLOPs of {}"),
    ]
    gates = [_gate(one) for one in findings if one["choices"]]
    return join_tables(
        [
            (
                f"Combinations ({source}, table 3: six data sets, MI250, 1 epoch)",
                [NUMBERS, *combined],
            ),
            (
                f"One primitive at a time ({source}, table 4: LLaVA-Wild, 1 epoch)",
                [NUMBERS, *swept],
            ),
            (
                f"Epochs: acceptance_length ({source}, table 7: LLaVA-Wild, MI250)",
                _scaling(findings),
            ),
            ("What a head keeps of an image, and computes", [cost_head, *costs]),
            (
                "What the gates choose on held-out questions",
                [["head", "questions", "branch: times chosen (mean share)"], *gates],
            ),
            (
                "acceptance_length by task family, in the engine",
                [["head", *FAMILIES], *families],
            ),
        ]
    )


def _by_size(text: str) -> list[str]:
    return [text.format(size) for size in IMAGE_TOKENS]


def _variant_of(finding: Finding) -> str:
    name: str = finding["name"]
    return name.rsplit("-e", 1)[0]


def _main(findings: Findings) -> dict[str, Finding]:
    """By variant, those after as many epochs as all variants were trained for."""
    return {_variant_of(one): one for one in findings if one["epochs"] == EPOCHS}


def best_known(finding: Finding) -> dict[str, Any] | None:
    """acceptance_length on the image tasks: by replay (more questions), or else in the engine."""
    engine = finding["engine"]
    found: dict[str, Any] | None = finding["replayed"]
    return found or (engine["acceptance_length"][IMAGES] if engine else None)


def _paper(reported: Sequence[float] | None) -> str:
    return "{:.2f}/{:.2f}".format(*reported) if reported else ""


def _numbers(one: Finding, paper: Sequence[float] | None) -> list[str]:
    engine, cells = one["engine"], [""] * 4
    if engine:
        cells = [
            shown(engine["acceptance_length"][IMAGES]),
            shown(engine["acceptance_length_ratio"]),
            shown(engine["decode_speedup"][IMAGES]),
            f"{engine['identical']}/{engine['answers_compared']}",
        ]
    return [
        one["label"], shown(one["replayed"]), shown(one["replayed_ratio"]), *cells, _paper(paper)
    ]  # fmt: skip


def _scaling(findings: Findings) -> Table:
    found = {(_variant_of(one), one["epochs"]): one for one in findings}
    known = dict.fromkeys(name for name, _ in found)
    names = [name for name in known if VARIANTS[name].epochs == SCALING]
    ours = [f"{VARIANTS[name].label}: replayed, speedup/engine" for name in names]
    table = [["epochs", *ours, "paper: EagleVLM", "paper: SpecVLM"]]
    for epochs in SCALING:
        mine = [found.get((name, epochs)) for name in names]
        if any(mine):
            paper = [_paper(column[epochs]) for column in PAPER["epochs"].values()]
            table.append([str(epochs), *map(_by_epoch, mine), *paper])
    return table


def _by_epoch(one: Finding | None) -> str:
    """Replayed, then the engine's numbers in the paper's form."""
    if one is None:
        return ""
    parts = [shown(one["replayed"])]
    if engine := one["engine"]:
        names = ("decode_speedup", "acceptance_length")
        parts.append(_paper([engine[name][IMAGES]["mean"] for name in names]))
    return ", ".join(filter(None, parts))


def _kept(kept: int, fewest: int, most: int) -> str:
    return str(kept) if fewest == kept else f"{kept}, seen {fewest} to {most}"


def _gate(one: Finding) -> list[str]:
    """How often a gate chose each branch, and its mean share, over all families."""
    families = one["choices"]
    counts_FK = np.array([family["counts"] for family in families])
    shares_FK = np.array([family["shares"] for family in families])
    shares = np.average(shares_FK, axis=0, weights=counts_FK.sum(axis=1))
    parts = zip(families[0]["branches"], counts_FK.sum(axis=0), shares, strict=True)
    text = ", ".join(f"{name}: {count} ({share:.2f})" for name, count, share in parts)
    return [f"{one['label']}, epoch {one['epochs']}", str(counts_FK.sum()), text]


def draw(content: Mapping[str, Any], file: Path) -> None:
    """Draw acceptance_length on the image tasks: over ratios, over queries, over epochs."""
    findings: Findings = content["rows"]
    known = _main(findings)
    several = [name for name, variant in VARIANTS.items() if variant.epochs == SCALING]
    with picture(file, SIZE_INCHES) as figure:
        ratios, queries, epochs = figure.subplots(1, 3, sharey=True)
        for axes, kind in ((ratios, "ratio"), (queries, "queries")):
            _draw_sweeps(axes, kind, known)
        for color, name in zip(COLORS, several, strict=False):
            there = [one for one in findings if _variant_of(one) == name]
            _curve(epochs, [one["epochs"] for one in there], there, VARIANTS[name].label, color)
        epochs.set_xticks(SCALING)
        epochs.set_xlabel("epochs")
        legend(epochs)
        ratios.set_ylabel("acceptance_length, image tasks (95 % interval)")


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
        means, errors = means_and_errors(found)
        axes.errorbar(places, means, yerr=errors, marker="o", capsize=3, color=color, label=label)
