"""What each part of ViSpec and of its training buys: `python -m benchmarks.ablation`.

Run it again to go on after a stop. To use several cores, run `--step prepare` once, then one
process per seed (`--seed 0 --step train --step measure`), then `--step report`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import typer

from benchmarks.answers import IMAGES, Found, ask_all, compare, make_rows, read_all
from benchmarks.calls import shown
from benchmarks.report import COLORS, Table, join_tables, means_and_errors, picture
from benchmarks.study import EPOCHS, ONLINE, Study, Variant, by_name, study_command
from examples.tiny_vlm.families import FAMILIES

SIZE_INCHES = (11, 4.5)
# Rollout as in the shipped head's recipe; every pass weighs a little less than the one before.
ROLLOUT = MappingProxyType({"loss.passes": "5", "loss.pass_decay": "0.9"})
ADAPTOR = "vispec_no_global"
VARIANTS = by_name(
    Variant("eagle_text", "EAGLE, text only", "eagle_text", data="text"),
    # EAGLE's loss is SpecVLM's: the text baseline as its authors train it.
    Variant(
        "eagle_text_own_loss",
        "EAGLE, text only, its own loss",
        "eagle_text",
        ONLINE,
        data="text",
        after="eagle_text",
    ),
    # From here on each variant adds one thing to the one before it.
    Variant("eagle_vlm", "EagleVLM", "eagle_vlm", answers="short"),
    Variant("adaptor", "+ adaptor", ADAPTOR, answers="short", after="eagle_vlm"),
    Variant("global", "+ global feature", "vispec", answers="short", after="adaptor"),
    Variant("regenerated", "+ answers of the target", "vispec", after="global"),
    Variant("rollout", "+ rollout passes", "vispec", ROLLOUT, after="regenerated"),
    # Two kinds of heads on the target's own answers: with "regenerated", what the adaptor and the
    # global feature buy once the data are right.
    Variant(
        "eagle_vlm_regenerated", "EagleVLM, answers of the target", "eagle_vlm", after="eagle_vlm"
    ),
    Variant(
        "adaptor_regenerated",
        "+ adaptor, answers of the target",
        ADAPTOR,
        after="eagle_vlm_regenerated",
    ),
    Variant(
        "online",
        "online distillation",
        "vispec",
        ONLINE,
        epochs=(1, 2, 3, 4, 5),
        after="regenerated",
    ),
)
# ViSpec and the EAGLE that differs from it only in what it is and in what it reads.
MATCHED = (("regenerated", "eagle_text"), ("online", "eagle_text_own_loss"))


def report(study: Study) -> dict[str, Any]:
    """Return the JSON's content."""
    found = read_all(study)
    return {
        "settings": study.settings(),
        "vispec_over_eagle": matched(found),
        "rows": make_rows(study, found),
    }


def matched(found: Found) -> dict[str, Any]:
    """How many times more acceptance_length ViSpec has on the image tasks, by the pair compared."""
    return {
        f"{ours} over {theirs}": compare(found[ours, EPOCHS], found[theirs, EPOCHS])
        for ours, theirs in MATCHED
        if (ours, EPOCHS) in found and (theirs, EPOCHS) in found
    }


def to_markdown(content: Mapping[str, Any]) -> str:
    """The tables of the page."""
    rows = content["rows"]
    ladder = [
        [
            row["label"],
            shown(row["acceptance_length"][IMAGES]),
            shown(row["decode_speedup"][IMAGES]),
            f"{shown(gain)}, `{row['over']}`" if (gain := row["acceptance_length_ratio"]) else "",
            f"{row['identical']}/{row['answers_compared']}",
        ]
        for row in rows
    ]
    gains = [[f"`{name}`", shown(gain)] for name, gain in content["vispec_over_eagle"].items()]
    head = ["variant", "acceptance_length", "decode_speedup", "over the variant it changes"]
    tables: list[Table] = [
        [[*head, "identical"], *ladder],
        [["matched data and steps", "acceptance_length, ratio"], *gains],
    ]
    for metric in ("acceptance_length", "decode_speedup"):
        cells = [[row["label"], *(shown(row[metric][name]) for name in FAMILIES)] for row in rows]
        tables.append([[metric, *FAMILIES], *cells])
    return join_tables(("", table) for table in tables)


def draw(content: Mapping[str, Any], file: Path) -> None:
    """Draw acceptance_length on the image tasks: variants as bars, epochs as a curve."""
    several = {name for name, variant in VARIANTS.items() if len(variant.epochs) > 1}
    bars, curve = (
        [row for row in content["rows"] if (row["variant"] in several) == one]
        for one in (False, True)
    )
    with picture(file, SIZE_INCHES) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        means, errors = means_and_errors([row["acceptance_length"][IMAGES] for row in bars])
        left.barh([row["label"] for row in bars], means, xerr=errors, color=COLORS[0], capsize=3)
        left.invert_yaxis()
        left.set_xlim(left=1.0)
        left.set_xlabel("acceptance_length, image tasks (K = 5, 95 % interval)")
        means, errors = means_and_errors([row["acceptance_length"][IMAGES] for row in curve])
        epochs = [row["epochs"] for row in curve]
        right.errorbar(epochs, means, yerr=errors, marker="o", capsize=3, color=COLORS[1])
        right.set_xticks(epochs)
        right.set_xlabel("epochs of online distillation")
        right.set_ylabel("acceptance_length, image tasks")


main = study_command("ablation", VARIANTS, (0, 1, 2), ask_all, report, to_markdown, draw)

if __name__ == "__main__":
    typer.run(main)
