"""What each part of ViSpec and of its training buys: `python -m benchmarks.ablation`.

Run it again to go on after a stop. To use several cores, run `--step prepare` once, then one
process per seed (`--seed 0 --step train --step measure`), then `--step report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import typer

from benchmarks.answers import IMAGES, Found, ask_all, compare, make_rows, read_all, shown
from benchmarks.report import COLORS, error_bars, markdown_table, new_figure, publish, save
from benchmarks.study import EPOCHS, ONLINE, Study, Variant, study_command
from examples.tiny_vlm.families import FAMILIES

SIZE_INCHES = (11, 4.5)
# Rollout as in the shipped head's recipe; every pass weighs a little less than the one before.
ROLLOUT = MappingProxyType({"loss.passes": "5", "loss.pass_decay": "0.9"})


def _of_kind(kind: str, more: Mapping[str, str] = MappingProxyType({})) -> Mapping[str, str]:
    return MappingProxyType({"head.kind": kind, **more})


# Each variant adds one thing to the one before it.
_EAGLE_TEXT = Variant("eagle_text", "EAGLE, text only", "text", "target", _of_kind("eagle_text"))
_EAGLE_VLM = Variant("eagle_vlm", "EagleVLM", "mixed", "short", _of_kind("eagle_vlm"))
_ADAPTOR = replace(
    _EAGLE_VLM,
    name="adaptor",
    label="+ adaptor",
    settings=_of_kind("vispec_no_global"),
    after="eagle_vlm",
)
_GLOBAL = replace(
    _ADAPTOR,
    name="global",
    label="+ global feature",
    settings=_of_kind("vispec"),
    after="adaptor",
)
_REGENERATED = replace(
    _GLOBAL, name="regenerated", label="+ answers of the target", answers="target", after="global"
)
_ROLLOUT = replace(
    _REGENERATED,
    name="rollout",
    label="+ rollout passes",
    settings=_of_kind("vispec", ROLLOUT),
    after="regenerated",
)
# The same three kinds of heads on the target's own answers: what the adaptor and the global feature
# buy once the data are right.
_EAGLE_VLM_OWN = replace(
    _EAGLE_VLM,
    name="eagle_vlm_regenerated",
    label="EagleVLM, answers of the target",
    answers="target",
    after="eagle_vlm",
)
_ADAPTOR_OWN = replace(
    _ADAPTOR,
    name="adaptor_regenerated",
    label="+ adaptor, answers of the target",
    answers="target",
    after="eagle_vlm_regenerated",
)
_ONLINE = replace(
    _REGENERATED,
    name="online",
    label="online distillation",
    settings=_of_kind("vispec", ONLINE),
    epochs=(1, 2, 3, 4, 5),
    after="regenerated",
)
# EAGLE's loss is SpecVLM's: the text baseline as its authors train it.
_EAGLE_TEXT_OWN_LOSS = replace(
    _EAGLE_TEXT,
    name="eagle_text_own_loss",
    label="EAGLE, text only, its own loss",
    settings=_of_kind("eagle_text", ONLINE),
    after="eagle_text",
)
VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        variant.name: variant
        for variant in (
            _EAGLE_TEXT,
            _EAGLE_TEXT_OWN_LOSS,
            _EAGLE_VLM,
            _ADAPTOR,
            _GLOBAL,
            _REGENERATED,
            _ROLLOUT,
            _EAGLE_VLM_OWN,
            _ADAPTOR_OWN,
            _ONLINE,
        )
    }
)
# ViSpec and the EAGLE that differs from it only in what it is and in what it reads.
MATCHED = (("regenerated", "eagle_text"), ("online", "eagle_text_own_loss"))


def matched(found: Found) -> dict[str, Any]:
    """How many times more acceptance_length ViSpec has on the image tasks, by the pair compared."""
    pairs = {pair: [found.get((name, EPOCHS)) for name in pair] for pair in MATCHED}
    return {
        " over ".join(pair): compare(one, other)
        for pair, (one, other) in pairs.items()
        if one and other
    }


def to_markdown(content: Mapping[str, Any]) -> str:
    """The tables of the page."""
    rows, gains = content["rows"], content["vispec_over_eagle"]
    ladder = [
        ["arm", "acceptance_length", "decode_speedup", "over the arm it changes", "identical"]
    ]
    for row in rows:
        gain = row["acceptance_length_ratio"]
        ladder.append(
            [
                row["label"],
                shown(row["acceptance_length"][IMAGES]),
                shown(row["decode_speedup"][IMAGES]),
                f"{shown(gain)}, `{row['over']}`" if gain else "",
                f"{row['identical']}/{row['answers_compared']}",
            ]
        )
    tables = [ladder]
    if gains:
        named = [[f"`{name}`", shown(gain)] for name, gain in gains.items()]
        tables.append([["matched data and steps", "acceptance_length, ratio"], *named])
    for metric in ("acceptance_length", "decode_speedup"):
        cells = [[row["label"], *(shown(row[metric][name]) for name in FAMILIES)] for row in rows]
        tables.append([[metric, *FAMILIES], *cells])
    return "\n\n".join(map(markdown_table, tables))


def draw(content: Mapping[str, Any], file: Path) -> None:
    """Draw acceptance_length on the image tasks: variants as bars, epochs as a curve."""
    figure = new_figure(SIZE_INCHES)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    several = {name for name, variant in VARIANTS.items() if len(variant.epochs) > 1}
    rows = content["rows"]
    bars, curve = ([r for r in rows if (r["arm"] in several) == one] for one in (False, True))
    means, errors = _means(bars)
    left.barh([row["label"] for row in bars], means, xerr=errors, color=COLORS[0], capsize=3)
    left.invert_yaxis()
    left.set_xlim(left=1.0)
    left.set_xlabel("acceptance_length, image tasks (K = 5, 95 % interval)")
    means, errors = _means(curve)
    epochs = [row["epochs"] for row in curve]
    right.errorbar(epochs, means, yerr=errors, marker="o", capsize=3, color=COLORS[1])
    right.set_xticks(epochs)
    right.set_xlabel("epochs of online distillation")
    right.set_ylabel("acceptance_length, image tasks")
    save(figure, file)


def _means(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[list[float]]]:
    found = [row["acceptance_length"][IMAGES] for row in rows]
    return [one["mean"] for one in found], error_bars(found)


def _measure(study: Study, _: bool) -> None:
    ask_all(study)


def _report(study: Study, output: Path, page: Path) -> None:
    found = read_all(study.workspace, study.variants, study.seeds)
    content = {
        "settings": study.settings(),
        "vispec_over_eagle": matched(found),
        "rows": make_rows(found, study.variants, study.seeds),
    }
    publish(output, page, content, to_markdown, draw)


main = study_command("ablation", VARIANTS, (0, 1, 2), _measure, _report)

if __name__ == "__main__":
    typer.run(main)
