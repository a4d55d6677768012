"""A whole training run: data, teacher, steps, validation, checkpoints, and the head at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vllm_vispec.heads.export import export_head
from vllm_vispec.train.checkpoint import Checkpoint, Checkpoints, Progress, check_same_settings
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.data import BatchOrder, Corpus, read_corpus
from vllm_vispec.train.distributed import Processes, StopRequest, stop_on_signals
from vllm_vispec.train.head_types import get_head_type, resolve
from vllm_vispec.train.init import make_draft
from vllm_vispec.train.metrics import OVERALL, GateDecisions
from vllm_vispec.train.optimizer import Plan, rate_factor
from vllm_vispec.train.run_log import RunLog, describe_run, now
from vllm_vispec.train.simulate import validate
from vllm_vispec.train.target import target_id
from vllm_vispec.train.teacher import OfflineTeacher, Teacher, cache_folder, open_teacher
from vllm_vispec.train.trainer import Trainer
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import read_json, sweep, write_json


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        finished: False if it was stopped; the same command goes on.
        step: finished optimizer steps.
        acceptance_length: of the last validation, simulated; None without held-out data.
        head: folder of the exported head, None if the run was stopped.
        message: one line for the user.
    """

    finished: bool
    step: int
    acceptance_length: float | None
    head: Path | None
    message: str


def fill_cache(config: TrainConfig, group: Processes) -> str:
    """Complete the cache of the offline teacher and stop; returns a line for the user.

    Raises:
        ViSpecError: see `OfflineTeacher`.
    """
    corpus = _corpus(config)
    teacher = OfflineTeacher(config, corpus, group)
    skipped = len(corpus.rejected) + len(teacher.rejected)
    return f"cache {cache_folder(config)}: {len(teacher.lengths)} samples, {skipped} skipped"


def train(
    config: TrainConfig, group: Processes, override: Sequence[str] = (), command: str = ""
) -> Outcome:
    """Run a recipe, from its last checkpoint if there is one.

    Args:
        override: settings that may differ from those of the checkpoint.
        command: the command line to note in run.json; "" = this process's own.

    Raises:
        ViSpecError: settings, data, target or disk do not allow it; one line says what to do.
    """
    config = resolve(config.require_complete())
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    run = Run(config, group, tuple(override), command)
    try:
        with stop_on_signals() as stop:
            return run.go(stop)
    finally:
        run.log.close()


def _corpus(config: TrainConfig) -> Corpus:
    return read_corpus(config.data, get_head_type(config.head.kind).text_only)


class Run:
    """One attempt at a recipe on one process."""

    def __init__(
        self, config: TrainConfig, group: Processes, override: tuple[str, ...], command: str
    ) -> None:
        self.config, self.group, self.command = config, group, command
        self.output = Path(config.run.output)
        self.checkpoints = Checkpoints(self.output / "checkpoints", config.run.keep)
        self.settings = config.flat() | {"processes": group.world}
        saved, self.overridden = self._saved(override)
        self.corpus = _corpus(config)
        self.teacher: Teacher = open_teacher(config, self.corpus, group)
        usable = self.teacher.lengths
        self.held_out = [index for index in self.corpus.validation if index in usable]
        chosen = tuple(index for index in self.corpus.train if index in usable)
        if not chosen:
            raise ViSpecError(
                "data.train has no sample left to train on: lower data.validation_share, or use "
                "a head.kind that trains on samples with images"
            )
        self.order = BatchOrder(chosen, usable, config.batch, group.world, config.run.seed)
        self.plan = Plan.from_settings(config.schedule, self.order.steps_per_epoch)
        draft = make_draft(config.head, self.teacher.facts, config.run.seed)
        self._compressor = draft.config.compressor_spec
        self.trainer = Trainer(config, draft, self.teacher, group)
        self.progress = Progress(world=group.world, seed=config.run.seed)
        if saved is not None:
            self.progress = saved.progress
            self.trainer.restore(saved.groups, saved.progress.step)
        self.log = RunLog(
            self.output, self.progress.step, self.plan.total_steps, silent=not group.is_main
        )
        # Since the last line of the log.
        self.decisions = GateDecisions()
        self.description = self._describe(len(chosen))

    def _saved(self, override: tuple[str, ...]) -> tuple[Checkpoint | None, list[str]]:
        sweep(self.output)
        steps = self.checkpoints.steps()
        if not steps:
            return None, []
        saved = self.checkpoints.load(steps[-1])
        return saved, check_same_settings(saved.settings, self.settings, override)

    def _describe(self, trained_on: int) -> dict[str, Any]:
        """run.json, written before the first step; a resumed run adds to it."""
        rejected = (*self.corpus.rejected, *self.teacher.rejected)
        used = {"train": trained_on, "validation": len(self.held_out)}
        model = target_id(self.config.target.model)
        content = describe_run(self.config, self.corpus, rejected, used, model, self.group.world)
        file = self.output / "run.json"
        content["command"] = self.command or content["command"]
        if self.progress.step and file.is_file():
            before = read_json(file)
            again = {
                "step": self.progress.step,
                "time": content["started"],
                "command": content["command"],
                "overridden": self.overridden,
            }
            content |= {key: before[key] for key in ("started", "command")}
            content["resumed"] = [*before.get("resumed", []), again]
        if self.group.is_main:
            write_json(file, content)
        skipped = ", ".join(
            f"{name} {entry['count']}"
            for name, entry in content["data"]["skipped_by_reason"].items()
        )
        self.log.info(
            f"train on {trained_on} samples, hold out {len(self.held_out)}, skip {len(rejected)}"
            + (f" ({skipped})" if skipped else "")
            + (f"; go on from step {self.progress.step}" if self.progress.step else "")
        )
        return content

    def go(self, stop: StopRequest) -> Outcome:
        """Train to the end, or to a request to stop."""
        settings, saved_at = self.config.run, self.progress.step
        for passes in self._steps():
            self._step(passes)
            step = self.progress.step
            improved = False
            if settings.validate_every and step % settings.validate_every == 0:
                improved = self._validate()
            stopping = self.group.any(bool(stop))
            if improved or stopping or (settings.save_every and step % settings.save_every == 0):
                self._save()
                saved_at = step
            if stopping and not self._is_over():
                return self._stopped(stop)
        if self.held_out and self.progress.latest_step != self.progress.step:
            self._validate()
            saved_at = -1
        if saved_at != self.progress.step:
            self._save()
        return self._finish()

    def _is_over(self) -> bool:
        return self.plan.is_over(self.progress.step, self.progress.seconds)

    def _steps(self) -> Iterator[list[list[int]]]:
        """The samples of every step still to come; the order depends on the seed and epoch."""
        while not self._is_over():
            epoch, position = divmod(self.progress.step, self.order.steps_per_epoch)
            for passes in self.order.epoch(epoch)[position:]:
                if self._is_over():
                    return
                yield [self.order.mine(samples, self.group.rank) for samples in passes]

    def _step(self, passes: Sequence[Sequence[int]]) -> None:
        before = self.progress
        share = self.plan.progress(before.step + 1, before.seconds)
        lr = self.config.optimizer.lr * rate_factor(self.config.schedule, share)
        result = self.trainer.step(passes, before.step, lr, share)
        epoch, position = divmod(before.step + 1, self.order.steps_per_epoch)
        self.progress = replace(
            before,
            step=before.step + 1,
            epoch=epoch,
            position=position,
            # One process's clock for all, or they would end at different steps.
            seconds=self.group.same(before.seconds + result.seconds),
        )
        self.log.advance(result.loss)
        self.decisions += result.decisions
        if self.progress.step % self.config.run.log_every == 0:
            self.log.step(self.progress, result, lr, self.decisions, self._compressor)
            self.decisions = GateDecisions()

    def _validate(self) -> bool:
        """Measure acceptance on held-out data; returns whether it is the best so far."""
        if not self.held_out:
            return False
        entries = self.corpus.entries
        found, decisions = validate(
            self.trainer.draft_with(self.trainer.weights_for_use()),
            self.teacher,
            self.held_out,
            [entries[index].conversation.family for index in self.held_out],
            self.config.run.num_draft_tokens,
            self.config.batch.size,
            self.group,
        )
        self.log.validation(self.progress, found, decisions, self._compressor)
        length, step = found[OVERALL].acceptance_length, self.progress.step
        improved = self.progress.best is None or length > self.progress.best
        self.progress = replace(self.progress, latest=length, latest_step=step)
        if improved:
            self.progress = replace(self.progress, best=length, best_step=step)
        return improved

    def _save(self) -> None:
        groups = self.trainer.state()
        if self.group.is_main:
            self.checkpoints.save(Checkpoint(self.progress, self.settings, groups))
        self.group.wait()

    def _stopped(self, stop: StopRequest) -> Outcome:
        message = (
            f"stopped by {stop.signal_name or 'another process'} after step {self.progress.step}; "
            f"saved in {self.checkpoints.folder}; run the same command to go on"
        )
        return Outcome(False, self.progress.step, self.progress.latest, None, message)

    def _finish(self) -> Outcome:
        head = self.output / "head"
        if self.group.is_main:
            self.description["finished"] = {
                "time": now(),
                "step": self.progress.step,
                "seconds": round(self.progress.seconds, 2),
                "acceptance_length": self.progress.latest,
                "best_step": self.progress.best_step,
                "best_acceptance_length": self.progress.best,
            }
            write_json(self.output / "run.json", self.description)
            self._export(head)
        self.group.wait()
        rate = (
            ""
            if self.progress.latest is None
            else f", acceptance_length {self.progress.latest:.3f} on held-out data"
        )
        message = f"finished after {self.progress.step} steps{rate}; head: {head}"
        return Outcome(True, self.progress.step, self.progress.latest, head, message)

    def _export(self, folder: Path) -> None:
        """Write the head that `run.export` names (the average of its weights if there is one)."""
        config, step = self.config, self.progress.step
        if config.run.export == "best" and self.progress.best_step is not None:
            step = self.progress.best_step
        groups = self.checkpoints.load(step).groups
        draft = self.trainer.draft_with(groups.get("average") or groups["weights"])
        export_head(
            draft.cpu(),
            folder,
            target=config.target.model,
            dtype=config.head.dtype,
            num_speculative_tokens=config.run.num_draft_tokens,
            provenance={**self.description, "exported_step": step},
            overwrite=True,
        )
