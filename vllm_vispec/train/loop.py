"""A whole training run: data, teacher, steps, validation, checkpoints, and the head at the end."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vllm_vispec.data.template import load_processor
from vllm_vispec.heads.export import Export, export_head, export_model
from vllm_vispec.spec_decode.low_acceptance import low_acceptance
from vllm_vispec.train.acceptance import OVERALL, describe_gate, show_drafts, validate
from vllm_vispec.train.cache import OfflineTeacher, open_teacher
from vllm_vispec.train.checkpoint import Checkpoint, Checkpoints, Progress, check_same_settings
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.data import GREEDY, BatchOrder, Corpus, describe_answers
from vllm_vispec.train.distributed import Processes, stop_on_signals
from vllm_vispec.train.init import make_draft
from vllm_vispec.train.preflight import prepare
from vllm_vispec.train.published import PublishedModel, find_start
from vllm_vispec.train.run_log import RunLog, describe_run, now
from vllm_vispec.train.trackers import open_trackers
from vllm_vispec.train.trainer import StepResult, Trainer, rate_factor
from vllm_vispec.train.units import Units, probe, spread, units_of
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import lock, read_json, sweep, write_json

# Steps of a run whose loss or gradients may be infinite or no number.
MOST_SKIPPED = 3


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        finished: False if it was stopped; the same command goes on.
        step: finished optimizer steps.
        head: folder of the exported head, None if the run was stopped.
        message: one line for the user, perhaps a warning below it.
    """

    finished: bool
    step: int
    head: Path | None
    message: str


def fill_cache(config: TrainConfig, group: Processes) -> str:
    """Complete the cache of the offline teacher and stop; returns a line for the user.

    Raises:
        ViSpecError: see `Teacher`.
    """
    config, corpus = prepare(config, group.world)
    teacher = OfflineTeacher(config, corpus, group)
    skipped = len(corpus.rejected) + len(teacher.rejected)
    return f"cache {teacher.folder}: {len(teacher.lengths)} samples, {skipped} skipped"


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
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    config, corpus = prepare(config, group.world)
    with ExitStack() as stack:
        if group.is_main:
            stack.enter_context(_holding(Path(config.run.output)))
        run = Run(config, corpus, group, tuple(override), command)
        stack.callback(run.log.close)
        return run.go(stack.enter_context(stop_on_signals()))


@contextmanager
def _holding(output: Path) -> Iterator[None]:
    """Let no other run have a folder meanwhile."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / "run.lock").open("ab")
    except OSError as error:
        raise ViSpecError(
            f"run.output={str(output)!r} cannot be written ({error.strerror or error}): choose "
            "another folder"
        ) from error
    with file:
        lock(file, f"run.output={str(output)!r} is in use by another run: choose another folder")
        yield


class Run:
    """One attempt at a recipe on one process."""

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        group: Processes,
        override: tuple[str, ...],
        command: str,
    ) -> None:
        published = find_start(config)
        self.config, self.group = config, group
        self.output = Path(config.run.output)
        sweep(self.output)
        self.checkpoints = Checkpoints(self.output / "checkpoints", config.run.keep)
        self.settings = config.flat() | {"processes": group.world}
        saved = self.checkpoints.latest()
        overridden = check_same_settings(saved.settings, self.settings, override) if saved else []
        # Before the expensive part: one may want a login.
        trackers = open_trackers(
            config.run.trackers if group.is_main else (),
            config.run.project,
            self.output,
            self.settings,
        )
        self.teacher = open_teacher(config, corpus, group, may_store=published is None)
        usable = self.teacher.lengths
        self.held_out = {
            index: corpus.entries[index].conversation.family
            for index in corpus.validation
            if index in usable
        }
        answers = describe_answers(corpus.entries[index] for index in self.held_out)
        self.measured_on = f"{len(self.held_out)} held-out {answers}"
        self.shown = spread(sorted(self.held_out), config.run.show_drafts)
        self.tokenizer = load_processor(config.target.model).tokenizer if self.shown else None
        chosen = tuple(index for index in corpus.train if index in usable)
        if not chosen:
            raise ViSpecError(
                "data.train has no sample left to train on: lower data.validation_share, or use "
                "a head.kind that trains on samples with images"
            )
        self.order = BatchOrder(chosen, usable, config.batch, group.world, config.run.seed)
        self.total_steps = config.schedule.total_steps(self.order.steps_per_epoch)
        draft = make_draft(config.head, self.teacher.facts, config.run.seed, published)
        self.compressor = draft.config.compressor_spec
        self.progress = saved.progress if saved is not None else Progress()
        if not self.progress.sample_rows:
            found = probe(self.teacher, chosen)
            changes = {"sample_rows": found.rows}
            # A head that is taken over has its units, a draft VLM reads no states.
            if saved is None and not config.head.init_from and not draft.config.is_draft_vlm:
                # One process's numbers for all: those of devices differ by rounding.
                sizes = (group.same(found.state_size), group.same(found.embed_size))
                units = units_of(draft.config, *sizes)
                changes |= {"state_size": units.state, "embed_size": units.embed}
            self.progress = self.progress.model_copy(update=changes)
        step_rows = self.progress.sample_rows * self.order.step_samples
        units = Units(self.progress.state_size, self.progress.embed_size)
        self.trainer = Trainer(config, draft, self.teacher, group, step_rows, units)
        step = self.progress.step
        if saved is not None:
            self.trainer.restore(saved.groups, step - saved.progress.skipped)
        self.log = RunLog(
            self.output,
            step,
            self.total_steps,
            silent=not group.is_main,
            trackers=trackers,
            measured_on=self.measured_on,
        )
        # Decisions of a gate since the last line of the log.
        self.decisions_2K = torch.zeros(())
        rejected = (*corpus.rejected, *self.teacher.rejected)
        used = {"train": len(chosen), "validation": len(self.held_out)}
        self.description = describe_run(config, corpus, rejected, used, group.world, command)
        self.description["units"] = units._asdict()
        self._note_start(overridden)

    def _note_start(self, overridden: list[str]) -> None:
        """Write run.json before the first step; a resumed run adds to it."""
        content, file, step = self.description, self.output / "run.json", self.progress.step
        if step and file.is_file():
            before = read_json(file)
            again = {
                "step": step,
                "time": content["started"],
                "command": content["command"],
                "overridden": overridden,
            }
            content |= {key: before[key] for key in ("started", "command")}
            content["resumed"] = [*before.get("resumed", []), again]
        if self.group.is_main:
            write_json(file, content)
        data = content["data"]
        reasons = data["skipped_by_reason"].items()
        skipped = ", ".join(f"{name} {entry['count']}" for name, entry in reasons)
        self.log.info(
            f"train on {data['used']['train']} samples, hold out {len(self.held_out)}, skip "
            f"{data['skipped']}"
            + (f" ({skipped})" if skipped else "")
            + (f"; go on from step {step}" if step else "")
        )
        if self.held_out and not self.measured_on.endswith(GREEDY):
            self.log.info(
                f"the best weights are chosen on {self.measured_on}; the target's greedy answers "
                "would show what an engine accepts: vispec regenerate --held-out 0.05 makes such "
                "ones, or --temperature 0 a file for data.validation"
            )
        self._note_checkpoints()

    def _note_checkpoints(self) -> None:
        """Say what checkpoints take, and when they are written."""
        settings, size = self.config.run, self.trainer.state_bytes
        every = f"every {settings.save_every} steps, " if settings.save_every else ""
        self.log.info(
            f"checkpoints of {size / 1e9:,.2f} GB: {every}at each best validation and at the end; "
            f"the best and the newest {settings.keep} are kept"
        )

    def go(self, signals: list[str]) -> Outcome:
        """Train to the end, or to a request to stop."""
        settings, saved_at = self.config.run, self.progress.step
        ready = self.teacher.ready(self._requests())
        while self._share() < 1:
            self._step(ready)
            step = self.progress.step
            improved = False
            if settings.validate_every and step % settings.validate_every == 0:
                improved = self._validate()
            stopping = self.group.any(bool(signals))
            if improved or stopping or (settings.save_every and step % settings.save_every == 0):
                self._save()
                saved_at = step
            if stopping and self._share() < 1:
                message = (
                    f"stopped by {[*signals, 'another process'][0]} after step {step}; saved in "
                    f"{self.checkpoints.folder}; run the same command to go on"
                )
                return Outcome(False, step, None, message)
        if self.held_out and self.progress.latest_step != self.progress.step:
            self._validate()
            saved_at = -1
        if saved_at != self.progress.step:
            self._save()
        return self._finish()

    def time(self, warm: int, steps: int) -> float:
        """Take steps; return the seconds of one, those of the first `warm` steps left out."""
        ready = self.teacher.ready(self._requests())
        begin = 0.0
        for number in range(warm + steps):
            if number == warm:
                begin = self.progress.seconds
            self._step(ready)
        return (self.progress.seconds - begin) / steps

    def _share(self, more_steps: int = 0) -> float:
        """The share of the run that is over, some steps from now; 1 at its end."""
        settings, progress = self.config.schedule, self.progress
        by_time = progress.seconds / (settings.minutes * 60) if settings.minutes else 0.0
        total = self.total_steps
        by_steps = (progress.step + more_steps) / total if total is not None else 0.0
        return min(max(by_steps, by_time), 1.0)

    def _requests(self) -> Iterator[list[int]]:
        """This process's samples of every forward pass to come; the epochs go on without end."""
        step = self.progress.step
        self._passes: deque[int] = deque()
        while True:
            epoch, position = divmod(step, self.order.steps_per_epoch)
            for batches in self.order.epoch(epoch)[position:]:
                mine = self.order.mine(batches, self.group.rank)
                self._passes.append(len(mine))
                yield from mine
                step += 1

    def _step(self, ready: Iterator[Sequence[Any]]) -> None:
        begin = time.perf_counter()
        first = next(ready)  # then the number of its step's passes is there
        passes = [first, *islice(ready, self._passes.popleft() - 1)]
        waited = time.perf_counter() - begin
        before, share = self.progress, self._share(more_steps=1)
        lr = self.config.optimizer.lr * rate_factor(self.config.schedule, share)
        result = self.trainer.step(passes, before.step, lr, share)
        step = before.step + 1
        # One process's clock for all, or they would end at different steps.
        seconds = self.group.same(before.seconds + waited + result.seconds)
        skipped = before.skipped + result.skipped
        self.progress = before.model_copy(
            update={"step": step, "seconds": seconds, "skipped": skipped}
        )
        if result.skipped:
            self._note_skipped(result, step)
        share = self._share()
        self.log.advance(result, seconds * (1 - share) / share if share else None)
        self.decisions_2K = self.decisions_2K + result.decisions_2K
        if step % self.config.run.log_every == 0:
            gate = describe_gate(self.decisions_2K, self.compressor)
            epoch = step // self.order.steps_per_epoch
            self.log.step(self.progress, epoch, result, waited, lr, gate)
            self.decisions_2K = torch.zeros(())

    def _note_skipped(self, result: StepResult, step: int) -> None:
        found, skipped = f"the loss of step {step} is {result.loss:g}", self.progress.skipped
        if math.isfinite(result.loss):
            found = f"the gradients of step {step} are not finite"
        if skipped > MOST_SKIPPED:
            raise ViSpecError(
                f"{found}, after {MOST_SKIPPED} steps that were skipped for that: lower "
                "optimizer.lr or set optimizer.clip"
            )
        self.log.info(f"{found}: skipped, {skipped} of at most {MOST_SKIPPED}")

    def _validate(self) -> bool:
        """Measure acceptance on held-out data; returns whether it is the best so far."""
        if not self.held_out:
            return False
        draft = self.trainer.draft_with(self.trainer.weights_for_use())
        found, decisions_2K = validate(
            draft,
            self.teacher,
            self.held_out,
            self.config.run.num_draft_tokens,
            self.config.batch.size,
            self.group,
        )
        self.log.validation(self.progress, found, describe_gate(decisions_2K, self.compressor))
        if self.group.is_main and self.shown:
            depth, tokenizer = self.config.run.num_draft_tokens, self.tokenizer
            for text in show_drafts(draft, self.teacher, self.shown, depth, tokenizer):
                self.log.show(text)
        length, step = found[OVERALL].acceptance_length, self.progress.step
        improved = self.progress.best is None or length > self.progress.best
        changes = {"latest": length, "latest_step": step}
        if improved:
            changes |= {"best": length, "best_step": step}
        self.progress = self.progress.model_copy(update=changes)
        return improved

    def _save(self) -> None:
        groups = self.trainer.state()
        if self.group.is_main:
            self.checkpoints.save(Checkpoint(self.progress, self.settings, groups))
        self.group.wait()

    def _finish(self) -> Outcome:
        head, progress = self.output / "head", self.progress
        if self.group.is_main:
            self.description["finished"] = {
                "time": now(),
                "step": progress.step,
                "seconds": round(progress.seconds, 2),
                "acceptance_length": progress.latest,
                "best_step": progress.best_step,
                "best_acceptance_length": progress.best,
                "skipped_steps": progress.skipped,
            }
            write_json(self.output / "run.json", self.description)
            self._export(head)
        self.group.wait()
        rate, low = "", None
        if progress.latest is not None:
            rate = f", acceptance_length {progress.latest:.3f} on {self.measured_on}"
            low = low_acceptance(progress.latest)
        plural = "s" * (progress.step != 1)
        message = f"finished after {progress.step} step{plural}{rate}; head: {head}"
        message += f"\nwarning: {low}" if low else ""
        return Outcome(True, progress.step, head, message)

    def _export(self, folder: Path) -> None:
        """Write the head that `run.export` names (the average of its weights if there is one)."""
        config, step = self.config, self.progress.step
        if config.run.export == "best" and self.progress.best_step is not None:
            step = self.progress.best_step
        groups = self.checkpoints.load(step).groups
        draft = self.trainer.draft_with(groups.get("average") or groups["weights"])
        to = Export(
            folder,
            config.target.model,
            config.head.dtype,
            config.run.num_draft_tokens,
            {**self.description, "exported_step": step},
            overwrite=True,
        )
        if isinstance(draft, PublishedModel):
            export_model(draft.model, draft.folder, to)
        else:
            export_head(draft.cpu(), to)
