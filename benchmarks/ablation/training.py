"""Heads of the arms."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from itertools import pairwise

from benchmarks.ablation.arms import Arm, Cell
from benchmarks.ablation.workspace import Workspace, run_vispec
from examples.pair import MAX_MODEL_LEN
from vllm_vispec.utils.errors import ViSpecError

RECIPE = "examples/recipes/tiny.yaml"
# What all arms share and the recipe has otherwise: a fixed number of steps, one pass.
BASE: Mapping[str, str] = {
    "loss.name": "kl",
    "loss.weights": "{feature: 0.5}",
    "loss.passes": "1",
    "loss.pass_decay": "1.0",
    "schedule.minutes": "0",
    "data.max_length": str(MAX_MODEL_LEN),
    "run.validate_every": "0",
    "run.save_every": "0",
    "run.export": "last",
    "head.dtype": "float32",
}


def settings_of(workspace: Workspace, target: str, arm: Arm, seed: int) -> dict[str, str]:
    """Everything that differs from the recipe, the number of epochs apart."""
    return {
        **BASE,
        "target.model": target,
        "data.train": str(workspace.samples(arm)),
        "data.validation": str(workspace.held_out),
        "teacher.cache_dir": str(workspace.cache(arm)),
        "run.output": str(workspace.run(arm, seed)),
        "run.seed": str(seed),
        **arm.settings,
    }


def fill_caches(workspace: Workspace, target: str, arms: Iterable[Arm], threads: int) -> None:
    """Complete the hidden states that arms share, before several runs need them at once."""
    for arm in {workspace.cache(arm): arm for arm in arms}.values():
        settings = settings_of(workspace, target, arm, 0) | {"teacher.mode": "offline"}
        settings["schedule.epochs"] = str(arm.epochs[-1])
        run_vispec(
            ["train", RECIPE, "--cache-only", *_flags(settings)],
            workspace.log(f"cache-{arm.data}-{arm.answers}"),
            threads,
        )


def train_arm(workspace: Workspace, target: str, arm: Arm, seed: int, threads: int) -> None:
    """Train one arm with one seed; a run goes on from one measured epoch to the next."""
    settings = settings_of(workspace, target, arm, seed)
    for before, epochs in pairwise((0, *arm.epochs)):
        head = workspace.head(Cell(arm, epochs, seed))
        if head.is_dir():
            continue
        override = ["--override", "schedule.epochs"] if before else []
        command = ["train", RECIPE, *_flags(settings | {"schedule.epochs": str(epochs)}), *override]
        trained = workspace.run(arm, seed) / "head"
        shutil.rmtree(trained, ignore_errors=True)  # of the epoch before
        run_vispec(command, workspace.log(f"train-{arm.name}-s{seed}"), threads)
        if not trained.is_dir():
            raise ViSpecError(f"training of {head.name} was stopped: run the same command to go on")
        partial = head.with_name(head.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(trained, partial)
        partial.rename(head)


def _flags(settings: Mapping[str, str]) -> list[str]:
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
