"""The steps of a study of arms, from questions to measured heads; each goes on after a stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.ablation.arms import EPOCHS, Arm, Cell
from benchmarks.ablation.data import prepare
from benchmarks.ablation.measure import NUM_DRAFT_TOKENS, Questions, measure_all
from benchmarks.ablation.training import RECIPE, fill_caches, train_arm
from benchmarks.ablation.workspace import Workspace
from examples.pair import DEFAULT_MODEL, ModelOption

RESULTS, PAGES = Path("benchmarks/results"), Path("docs/evidence")


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


def study_command(
    name: str,
    arms: Mapping[str, Arm],
    seeds: tuple[int, ...],
    report: Callable[[Study, Path, Path], None],
    measure_more: Callable[[Study, bool], None] | None = None,
) -> Callable[..., None]:
    """Return the command of a study.

    Args:
        name: of its folder below `out`, its JSON and its page.
        report: gets the JSON file and the page.
        measure_more: what the engine's questions do not say; with prefills or without.
    """

    def main(
        model: ModelOption = DEFAULT_MODEL,
        work_dir: Annotated[Path, typer.Option(help="Data, runs and results so far.")] = Path("out")
        / name,
        step: Annotated[list[Step] | None, typer.Option(help="Only these parts; repeat.")] = None,
        seed: Annotated[list[int] | None, typer.Option(help="Repeat. Default: all.")] = None,
        arm: Annotated[list[str] | None, typer.Option(help="Repeat. Default: all.")] = None,
        samples: Annotated[int, typer.Option(min=32, help="Of each training set.")] = 1680,
        held_out: Annotated[int, typer.Option(min=7, help="For the curves of the runs.")] = 112,
        per_family: Annotated[int, typer.Option(min=1, help="Questions to the engine.")] = 4,
        timed: Annotated[int, typer.Option(min=1, help="Of these, timed.")] = 1,
        threads: Annotated[int, typer.Option(min=1, help="Of every process.")] = 1,
        prefill: Annotated[
            bool, typer.Option(help="Compressors only: time the draft's part of prefills.")
        ] = True,
        output: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / f"{name}.json",
        page: Annotated[Path, typer.Option(help="Page with the tables.")] = PAGES / f"{name}.md",
    ) -> None:
        """Train and measure every arm with every seed."""
        if not prefill and measure_more is None:
            raise typer.BadParameter(f"--no-prefill: the study {name} times no prefills")
        study = Study(
            Workspace(work_dir.resolve()),
            model,
            choose_arms(arm, arms),
            tuple(seed or seeds),
            samples,
            held_out,
            Questions(per_family, timed),
            threads,
        )
        steps = set(step or Step)
        study.run(steps)
        if Step.MEASURE in steps and measure_more is not None:
            measure_more(study, prefill)
        if Step.REPORT in steps:
            report(study, output, page)

    return main
