"""The tables of the page: ours beside the paper's, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.ablation.results import IMAGES
from benchmarks.compressors.arms import REFERENCE, SCALING, SWEEPS
from benchmarks.compressors.choices import in_all
from benchmarks.compressors.cost import IMAGE_TOKENS
from benchmarks.compressors.findings import Finding, at_main_epoch
from benchmarks.compressors.paper import SOURCE, TABLE_3, TABLE_4, TABLE_7, Reported
from benchmarks.report import markdown_table
from examples.tiny_vlm.families import FAMILIES

COMBINATIONS = (REFERENCE, "weighted", "concat", "select")
OTHERS = ("eagle_vlm_no_norm", "text_only", "adaptor", "adaptor_global", "select_global")
NOTHING = ""
NUMBERS = (
    "replayed",
    "over EagleVLM",
    "in the engine",
    "over EagleVLM",
    "decode_speedup",
    "identical",
    "paper: speedup/tokens per round",
)

Rows = list[list[str]]


def all_tables(findings: Sequence[Finding]) -> str:
    """Every table that has a row, with its title."""
    tables: Mapping[str, Callable[[Sequence[Finding]], Rows]] = {
        f"Combinations ({SOURCE}, table 3: six data sets, MI250, 1 epoch)": _combinations,
        f"One primitive at a time ({SOURCE}, table 4: LLaVA-Wild, 1 epoch)": _sweeps,
        f"Epochs: tokens_per_round ({SOURCE}, table 7: LLaVA-Wild, MI250)": _scaling,
        "What a head keeps of an image, and computes": _costs,
        "The draft's part of a prefill, measured": _prefill,
        "What the gates choose on held-out questions": _choices,
        "tokens_per_round by task family, in the engine": _families,
    }
    found = {title: make(findings) for title, make in tables.items()}
    parts = [
        f"### {title}\n\n{markdown_table(rows)}" for title, rows in found.items() if len(rows) > 1
    ]
    return "\n\n".join(parts)


def _by_name(findings: Sequence[Finding]) -> dict[str, Finding]:
    return {one.arm.name: one for one in at_main_epoch(findings)}


def _numbers(one: Finding, paper: Reported | None) -> list[str]:
    found: list[object] = [one.replayed, one.replayed_gain]
    if one.row is not None:
        found += [one.row.tokens_per_round[IMAGES], one.row.gain, one.row.decode_speedup[IMAGES]]
        found.append(f"{one.row.identical}/{one.row.answers}")
    found += [None] * (len(NUMBERS) - 1 - len(found))
    return [NOTHING if number is None else str(number) for number in (*found, paper)]


def _combinations(findings: Sequence[Finding]) -> Rows:
    known = _by_name(findings)
    rows = [["tokens_per_round of", *NUMBERS]]
    for name in (*COMBINATIONS, *OTHERS):
        if name in known:
            rows.append([known[name].arm.label, *_numbers(known[name], TABLE_3.get(name))])
    return rows


def _sweeps(findings: Sequence[Finding]) -> Rows:
    known = _by_name(findings)
    rows = [["tokens_per_round of", *NUMBERS]]
    for name, amounts in SWEEPS.items():
        for amount in amounts:
            one = known.get(f"{name}_{amount}")
            if one is not None:
                rows.append([one.arm.label, *_numbers(one, TABLE_4[name][amount])])
    return rows


def _scaling(findings: Sequence[Finding]) -> Rows:
    found = {(one.arm.name, one.cell.epochs): one for one in findings}
    arms = {one.arm.name: one.arm for one in findings if one.arm.epochs == SCALING}
    rows = [["epochs", *(f"{arm.label}: replayed, speedup/engine" for arm in arms.values())]]
    rows[0] += ["paper: EagleVLM", "paper: SpecVLM"]
    for epochs in SCALING:
        ours = [found.get((name, epochs)) for name in arms]
        if any(ours):
            paper = [str(column[epochs]) for column in TABLE_7.values()]
            rows.append([str(epochs), *map(_by_epoch, ours), *paper])
    return rows


def _by_epoch(one: Finding | None) -> str:
    if one is None:
        return NOTHING
    parts = [str(one.replayed)] if one.replayed else []
    if one.row is not None:
        # In the paper's form: speedup/tokens per round.
        speedup, tokens = one.row.decode_speedup[IMAGES], one.row.tokens_per_round[IMAGES]
        parts.append(f"{speedup.mean:.2f}/{tokens.mean:.2f}")
    return ", ".join(parts)


def _costs(findings: Sequence[Finding]) -> Rows:
    sizes = [str(size) for size in IMAGE_TOKENS]
    rows = [["head", "weights for images", *(f"KV tokens of {size}" for size in sizes)]]
    rows[0] += [f"MFLOPs of {size}" for size in sizes]
    for one in at_main_epoch(findings):
        kept = [_kept(cost.kv_tokens, cost.seen) for cost in one.costs.values()]
        flops = [f"{cost.megaflops:.1f}" for cost in one.costs.values()]
        rows.append([one.arm.label, f"{one.parameters[1]:,}", *kept, *flops])
    return rows


def _kept(kept: int, seen: tuple[int, int]) -> str:
    fewest, most = seen
    return str(kept) if fewest == kept else f"{kept}, seen {fewest} to {most}"


def _prefill(findings: Sequence[Finding]) -> Rows:
    rows = [["head", *(f"{size}: ms" for size in IMAGE_TOKENS)]]
    rows[0] += [f"{size}: over EagleVLM" for size in IMAGE_TOKENS]
    for one in at_main_epoch(findings):
        if one.prefill:
            found = list(one.prefill.values())
            times = [f"{1000 * part.seconds:.1f}" for part in found]
            ratios = [f"{part.ratio:.2f} ({part.low:.2f}-{part.high:.2f})" for part in found]
            rows.append([one.arm.label, *times, *ratios])
    return rows


def _choices(findings: Sequence[Finding]) -> Rows:
    rows = [["head", "questions", "branch: times chosen (mean share)"]]
    for one in findings:
        if one.choices:
            found = in_all(one.choices)
            parts = zip(found.branches, found.counts, found.shares, strict=True)
            text = ", ".join(f"{name}: {count} ({share:.2f})" for name, count, share in parts)
            rows.append([f"{one.arm.label}, epoch {one.cell.epochs}", str(sum(found.counts)), text])
    return rows


def _families(findings: Sequence[Finding]) -> Rows:
    rows = [["head", *FAMILIES]]
    for one in at_main_epoch(findings):
        if one.row is not None:
            numbers = one.row.tokens_per_round
            rows.append([one.arm.label, *(str(numbers[name]) for name in FAMILIES)])
    return rows
