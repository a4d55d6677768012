"""Numbers of all measured heads, and the tables of the ablation page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.ablation.arms import EPOCHS, MATCHED, Arm, Cell
from benchmarks.ablation.intervals import (
    Estimate,
    Seeds,
    decode_speedup,
    estimate,
    ratio,
    tokens_per_round,
)
from benchmarks.ablation.measure import Asked, read_measured
from benchmarks.ablation.workspace import Workspace
from benchmarks.report import markdown_table
from examples.tiny_vlm.families import FAMILIES
from examples.tiny_vlm.questions import IMAGE_FAMILIES

IMAGES = "image tasks"
GROUPS: Mapping[str, tuple[str, ...]] = {
    IMAGES: IMAGE_FAMILIES,
    **{name: (name,) for name in FAMILIES},
}


@dataclass(frozen=True)
class Row:
    """One arm after some epochs, over its seeds; numbers by group of task families."""

    arm: Arm
    epochs: int
    seeds: tuple[int, ...]
    identical: int
    answers: int
    tokens_per_round: Mapping[str, Estimate]
    decode_speedup: Mapping[str, Estimate]
    gain: Estimate | None

    @property
    def name(self) -> str:
        """As in the JSON."""
        return f"{self.arm.name}-e{self.epochs}"

    @property
    def label(self) -> str:
        """As in the tables."""
        several = len(self.arm.epochs) > 1
        return f"{self.arm.label}, epoch {self.epochs}" if several else self.arm.label

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "arm": self.arm.name,
            "label": self.label,
            "data": self.arm.data,
            "answers": self.arm.answers,
            "settings": dict(self.arm.settings),
            "epochs": self.epochs,
            "seeds": self.seeds,
            "identical": self.identical,
            "answers_compared": self.answers,
            "tokens_per_round": _plain(self.tokens_per_round),
            "decode_speedup": _plain(self.decode_speedup),
            "over": self.arm.after,
            "tokens_per_round_ratio": asdict(self.gain) if self.gain else None,
        }


def _plain(found: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: asdict(one) for name, one in found.items()}


Found = Mapping[tuple[str, int], Seeds[Asked]]  # by arm and epochs


def read_all(workspace: Workspace, arms: Iterable[Arm], seeds: Sequence[int]) -> Found:
    """Answers with the heads of all arms of which every seed was measured."""
    found: dict[tuple[str, int], Seeds[Asked]] = {}
    for arm in arms:
        for epochs in arm.epochs:
            files = [workspace.measured(Cell(arm, epochs, seed)) for seed in seeds]
            if all(file.is_file() for file in files):
                found[arm.name, epochs] = [read_measured(file) for file in files]
    return found


def make_rows(found: Found, arms: Iterable[Arm], seeds: Sequence[int]) -> list[Row]:
    """One row per measured arm and number of epochs."""
    return [
        _row(arm, epochs, tuple(seeds), found[arm.name, epochs], found.get((arm.after, epochs)))
        for arm in arms
        for epochs in arm.epochs
        if (arm.name, epochs) in found
    ]


def matched(found: Found) -> dict[str, Estimate]:
    """How many times more tokens_per_round ViSpec has on the image tasks, by the pair compared."""
    pairs = {pair: [found.get((name, EPOCHS)) for name in pair] for pair in MATCHED}
    return {
        " over ".join(pair): compare(one, other)
        for pair, (one, other) in pairs.items()
        if one and other
    }


def _row(
    arm: Arm, epochs: int, seeds: tuple[int, ...], asked: Seeds[Asked], before: Seeds[Asked] | None
) -> Row:
    everything = [one for answers in asked for one in answers]
    timed = [[one for one in answers if one.plain_seconds is not None] for answers in asked]
    return Row(
        arm,
        epochs,
        seeds,
        sum(one.identical for one in everything),
        len(everything),
        {name: estimate(_only(asked, names), tokens_per_round) for name, names in GROUPS.items()},
        {name: estimate(_only(timed, names), decode_speedup) for name, names in GROUPS.items()},
        compare(asked, before) if before else None,
    )


def compare(asked: Seeds[Asked], before: Seeds[Asked]) -> Estimate:
    """Ratio of tokens_per_round on the image tasks."""
    names = GROUPS[IMAGES]
    return ratio(_only(asked, names), _only(before, names), tokens_per_round)


def _only(seeds: Seeds[Asked], families: Sequence[str]) -> list[list[Asked]]:
    return [[one for one in asked if one.family in families] for asked in seeds]


def to_markdown(rows: Sequence[Row], gains: Mapping[str, Estimate]) -> str:
    """The tables of the ablation page."""
    ladder = [["arm", "tokens_per_round", "decode_speedup", "over the arm it changes", "identical"]]
    ladder += [
        [
            row.label,
            str(row.tokens_per_round[IMAGES]),
            str(row.decode_speedup[IMAGES]),
            f"{row.gain}, `{row.arm.after}`" if row.gain else "",
            f"{row.identical}/{row.answers}",
        ]
        for row in rows
    ]
    parts = [markdown_table(ladder)]
    if gains:
        names = [["matched data and steps", "tokens_per_round, ratio"]]
        parts.append(
            markdown_table([*names, *([f"`{name}`", str(one)] for name, one in gains.items())])
        )
    values: tuple[tuple[str, Callable[[Row], Mapping[str, Estimate]]], ...] = (
        ("tokens_per_round", lambda row: row.tokens_per_round),
        ("decode_speedup", lambda row: row.decode_speedup),
    )
    for title, numbers in values:
        table = [[title, *FAMILIES]]
        table += [[row.label, *(str(numbers(row)[name]) for name in FAMILIES)] for row in rows]
        parts.append(markdown_table(table))
    return "\n\n".join(parts)
