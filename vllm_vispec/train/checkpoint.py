"""Checkpoints of a run: everything that the next step depends on, as safetensors and JSON.

`checkpoints/step-NNNNNNNN/` holds state.safetensors (`weights.*`, the moments `moment1.*` and
`moment2.*` of AdamW and, with an average, `average.*`) and state.json (progress and settings).
Order, noise and initial weights follow from the seed and the step, so there is no other random
state. A checkpoint appears whole or not at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from vllm_vispec.train.config import TrainConfig
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import (
    read_json,
    read_tensors,
    sweep,
    write_json,
    write_tensors,
    writing,
)

Tensors = dict[str, Tensor]
FORMAT = 1

# Settings that may change when a run goes on: they do not alter what the next step computes.
FREE_SETTINGS = (
    "batch.global_size",  # it decides batch.accumulate, which is compared
    "data.memory_mb",
    "data.workers",
    "head.dtype",
    "loss.chunk_rows",
    "run.device",
    "run.export",
    "run.keep",
    "run.log_every",
    "run.output",
    "run.project",
    "run.save_every",
    "run.shard",
    "run.show_drafts",
    "run.threads",
    "run.trackers",
    "run.validate_every",
    "teacher.cache_dir",
    "teacher.shard_samples",
)


class Progress(BaseModel):
    """How far a run is.

    Attributes:
        step: finished optimizer steps.
        seconds: training time so far, validation and saving excluded.
        best, best_step: highest acceptance length so far, and its step.
        latest, latest_step: acceptance length of the last validation, and its step.
        skipped: steps that changed nothing because their loss was not finite.
        sample_rows: counted rows of a sample on average, measured at the run's start; 0: not yet.
        state_size, embed_size: the units of the weights, see `vllm_vispec.train.units`.
    """

    # Checkpoints from before December 2026 hold more.
    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int | None = None
    latest: float | None = None
    latest_step: int | None = None
    skipped: int = 0
    sample_rows: float = 0.0
    state_size: float = 1.0
    embed_size: float = 1.0


@dataclass(frozen=True)
class Checkpoint:
    """A saved state, its tensors grouped: group -> name -> tensor on the CPU."""

    progress: Progress
    settings: Mapping[str, Any]
    groups: Mapping[str, Tensors]


class Checkpoints:
    """The checkpoints folder of a run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, ascending."""
        found = self.folder.glob("step-*/state.json")
        return sorted(int(path.parent.name.removeprefix("step-")) for path in found)

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint, None if there is none."""
        steps = self.steps()
        return self.load(steps[-1]) if steps else None

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then drop old ones.

        Raises:
            ViSpecError: it cannot be written; earlier ones are untouched.
        """
        path = self._path(checkpoint.progress.step)
        sweep(self.folder)
        tensors = {
            f"{group}.{name}": tensor
            for group, members in checkpoint.groups.items()
            for name, tensor in members.items()
        }
        content = {
            "format": FORMAT,
            "progress": checkpoint.progress.model_dump(),
            "settings": dict(checkpoint.settings),
        }
        with writing(path) as aside:
            aside.mkdir()
            write_tensors(aside / "state.safetensors", tensors)
            write_json(aside / "state.json", content)
            shutil.rmtree(path, ignore_errors=True)  # the same step, saved by an earlier attempt
        for step in self.steps()[: -self._keep]:
            if step != checkpoint.progress.best_step:
                shutil.rmtree(self._path(step), ignore_errors=True)

    def load(self, step: int) -> Checkpoint:
        """Read the checkpoint of a step.

        Raises:
            ViSpecError: it is damaged or from a newer release.
        """
        path = self._path(step)
        content = read_json(path / "state.json")
        if content.get("format") != FORMAT:
            raise ViSpecError(
                f"{path} has format {content.get('format')!r}, this release reads {FORMAT}: use "
                "the release that wrote it, or another run.output"
            )
        groups: dict[str, Tensors] = {}
        for name, tensor in read_tensors(path / "state.safetensors").items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = tensor
        return Checkpoint(Progress(**content["progress"]), content["settings"], groups)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


def check_same_settings(
    saved: Mapping[str, Any], now: Mapping[str, Any], allowed: tuple[str, ...] = ()
) -> list[str]:
    """Refuse to resume with settings that change what is computed.

    A setting that an older checkpoint does not know counts as its default.

    Args:
        allowed: settings whose change the user confirmed.

    Returns:
        The names of settings that differ and are allowed to.

    Raises:
        ViSpecError: others differ; names them and the option that allows it.
    """
    before = TrainConfig().flat() | dict(saved)
    differing = sorted(
        name
        for name in {*saved, *now}
        if name not in FREE_SETTINGS and before.get(name) != now.get(name)
    )
    refused = [name for name in differing if name not in allowed]
    if refused:
        changes = ", ".join(f"{n}: {before.get(n)!r} -> {now.get(n)!r}" for n in refused)
        raise ViSpecError(
            f"run.output holds a run with other settings ({changes}): choose another run.output, "
            f"or go on with the new ones by --override {','.join(differing)}"
        )
    return differing
