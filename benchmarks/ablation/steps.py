"""The steps of a study of arms, from questions to measured heads; each goes on after a stop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from benchmarks.ablation.arms import EPOCHS, Arm, Cell
from benchmarks.ablation.data import prepare
from benchmarks.ablation.measure import NUM_DRAFT_TOKENS, Questions, measure_all
from benchmarks.ablation.training import RECIPE, fill_caches, train_arm
from benchmarks.ablation.workspace import Workspace

TABLE_MARKS = ("<!-- tables: begin -->", "<!-- tables: end -->")


class Step(StrEnum):
    """Parts of the run, in their order."""

    PREPARE = "prepare"
    TRAIN = "train"
    MEASURE = "measure"
    REPORT = "report"


@dataclass(frozen=True)
class Study:
    """What is trained and measured, and where.

    Attributes:
        target: folder or hub id.
        samples, held_out: see `data.prepare`.
        threads: of every process.
    """

    workspace: Workspace
    target: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    samples: int
    held_out: int
    questions: Questions
    threads: int

    @property
    def cells(self) -> list[Cell]:
        """Every head, seed by seed."""
        return [
            Cell(arm, epochs, seed)
            for seed in self.seeds
            for arm in self.arms
            for epochs in arm.epochs
        ]

    def settings(self) -> dict[str, Any]:
        """What the JSON file says of the run."""
        return {
            "samples": self.samples,
            "epochs": EPOCHS,
            "recipe": RECIPE,
            "seeds": self.seeds,
            "num_speculative_tokens": NUM_DRAFT_TOKENS,
            "per_family": self.questions.per_family,
            "timed_per_family": self.questions.timed,
            "threads": self.threads,
            "batch": 1,
            "temperature": 0,
        }

    def run(self, steps: Iterable[Step]) -> None:
        """Do those of the steps that are not done, the report left out."""
        for step, act in _ACTIONS.items():
            if step in set(steps):
                act(self)


def _prepare(study: Study) -> None:
    prepare(study.workspace, study.target, study.samples, study.held_out, study.threads, study.arms)
    fill_caches(study.workspace, study.target, study.arms, study.threads)


def _train(study: Study) -> None:
    for seed in study.seeds:
        for arm in study.arms:
            train_arm(study.workspace, study.target, arm, seed, study.threads)
            print(f"trained: {arm.name}, seed {seed}", flush=True)


def _measure(study: Study) -> None:
    trained = [cell for cell in study.cells if study.workspace.head(cell).is_dir()]
    for cell in study.cells:
        if cell not in trained:
            print(f"not trained, so not measured: {cell.name}", flush=True)
    measure_all(study.workspace, study.target, trained, study.questions, study.threads)


_ACTIONS = {Step.PREPARE: _prepare, Step.TRAIN: _train, Step.MEASURE: _measure}


def choose_arms(names: Sequence[str] | None, arms: Mapping[str, Arm]) -> tuple[Arm, ...]:
    """The arms of these names, all if there are none.

    Raises:
        typer.BadParameter: a name is unknown.
    """
    unknown = [name for name in names or () if name not in arms]
    if unknown:
        raise typer.BadParameter(f"--arm {unknown[0]} is unknown: use {', '.join(arms)}")
    return tuple(arms[name] for name in names or arms)


def put_tables(page: Path, tables: str) -> None:
    """Replace what stands between the marks of the page."""
    begin, end = TABLE_MARKS
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(begin, 1)
    page.write_text(
        f"{before}{begin}\n\n{tables}\n\n{end}{rest.split(end, 1)[1]}", encoding="utf-8"
    )
