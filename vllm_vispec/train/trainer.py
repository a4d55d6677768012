"""The trainer: one optimizer step, the learning rate, and the state carried from step to step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_vispec.reference import Draft
from vllm_vispec.train.checkpoint import Tensors
from vllm_vispec.train.config import ScheduleConfig, TrainConfig
from vllm_vispec.train.distributed import Processes, accumulating, assign, shared, whole
from vllm_vispec.train.losses import Objective, Sums, make_generator
from vllm_vispec.train.memory import BACKWARD, explained, part
from vllm_vispec.train.rollout import ROW_MULTIPLE
from vllm_vispec.train.target import DraftBatch, pad_batch
from vllm_vispec.train.teacher import Teacher
from vllm_vispec.train.units import Units
from vllm_vispec.utils.errors import ViSpecError

# An average of few steps would still hold mostly the start: its decay grows as (1 + t) / (10 + t).
_EMA_DELAY = 10
# Trained weights from which on a copy for each process, 16 bytes a weight, takes too much of a GPU.
SHARDED_FROM = 1_000_000_000
# Share of the learning rate that is left after a share x of the decay.
SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "constant": lambda x: 1.0,
}


def rate_factor(settings: ScheduleConfig, progress: float) -> float:
    """Return the learning rate as a share of its peak.

    Args:
        progress: share of the run that is over when the step is done, 0 to 1.
    """
    if progress < settings.warmup:
        return progress / settings.warmup
    left = 1 - settings.warmup
    over = (progress - settings.warmup) / left if left else 1.0
    return settings.floor + (1 - settings.floor) * SHAPES[settings.decay](over)


def is_sharded(config: TrainConfig, draft: Draft) -> bool:
    """Whether several processes share a draft's weights and moments instead of copying them."""
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    return config.run.shard == "on" or (config.run.shard == "auto" and trained >= SHARDED_FROM)


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all processes.

    Attributes:
        loss: weighted loss per counted row, passes added up.
        parts: mean of every loss term over the rows of pass 0.
        accuracy: share of these rows whose most likely token is the answer's.
        rows: counted rows of pass 0.
        tokens: tokens of the samples, prompts and images included.
        gradient_norm: before clipping.
        skipped: loss or gradients were not finite, so the weights stayed as they were.
        seconds: of this process.
        decisions_2K: of the head's gate, see `acceptance.sum_decisions`.
    """

    loss: float
    parts: Mapping[str, float]
    accuracy: float
    rows: int
    tokens: int
    gradient_norm: float
    skipped: bool
    seconds: float
    decisions_2K: Tensor


class Trainer:
    """A draft in training on one process of the run.

    Args:
        step_rows: counted rows that a step has on average. Sums over a step's rows are divided by
            them, not by the step's own, so that a token weighs the same in every step.
        units: what the draft's weights are in during training.
    """

    def __init__(
        self,
        config: TrainConfig,
        draft: Draft,
        teacher: Teacher[Any],
        group: Processes,
        step_rows: float,
        units: Units,
    ) -> None:
        self._config, self._teacher, self._group = config, teacher, group
        self._step_rows, self._units = step_rows, units
        self.head_config = draft.config
        self._objective = Objective(draft, teacher.facts.lm_head_VD, config.loss, units).to(
            group.device
        )
        if config.run.compile == "on":
            self._objective.compile_parts()
        # Before sharding, so that one process alone can export them.
        self._frozen: Tensors = {
            name: w.detach() for name, w in draft.named_parameters() if not w.requires_grad
        }
        shard = is_sharded(config, draft)
        self._replica = shared(self._objective, group, shard)
        weights = {name: w for name, w in draft.named_parameters() if w.requires_grad}
        settings = config.optimizer
        self._optimizer = torch.optim.AdamW(
            list(weights.values()),
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=group.world == 1 or not shard or group.device.type == "cuda",
        )
        # All that the next step depends on, by the groups of a checkpoint.
        self._state: dict[str, Tensors] = {
            "weights": {**weights},
            "moment1": {name: torch.zeros_like(w) for name, w in weights.items()},
            "moment2": {name: torch.zeros_like(w) for name, w in weights.items()},
            "average": {name: w.detach().clone() for name, w in weights.items()}
            if settings.ema
            else {},
        }
        for name, weight in weights.items():
            self._optimizer.state[weight] = {
                "step": torch.zeros((), device=group.device),
                "exp_avg": self._state["moment1"][name],
                "exp_avg_sq": self._state["moment2"][name],
            }
        autocast = config.run.autocast
        on_gpu = group.device.type == "cuda"
        self._autocast = on_gpu if autocast == "auto" else autocast == "bfloat16"

    def step(
        self, passes: Sequence[Sequence[Any]], number: int, lr: float, progress: float = 0.0
    ) -> StepResult:
        """Train on this process's samples of a step.

        Args:
            passes: samples of each forward pass, as `Teacher.ready` gives them.
            number: finished steps before this one.
            lr: learning rate.
            progress: share of the run that is over when the step is done, 0 to 1.

        Raises:
            ViSpecError: memory ran out, or a weight got no gradient.
        """
        begin, tokens = time.perf_counter(), 0
        found: list[Sums] = []
        for place, samples in enumerate(passes):
            # A batch has the same number, and draws the same, on any number of processes.
            index = place * self._group.world + self._group.rank
            observed = self._teacher.observe(samples)
            sizes = {one.sample_id: len(one.token_ids) for one in observed}
            more = place + 1 < len(passes)
            with explained("the draft", sizes), accumulating(self._replica, more):
                batch = pad_batch(observed, ROW_MULTIPLE).to(self._group.device, torch.float32)
                tokens += sum(batch.lengths)
                found.append(self._forward(batch, number, index, progress))
                with part(BACKWARD):
                    found[-1].loss.backward()
        columns = {"tokens": tokens, "loss": sum(float(one.loss.detach()) for one in found)}
        for name in found[0].of_rows:
            columns[name] = sum(float(one.of_rows[name]) for one in found)
        summed = self._group.sum(torch.tensor([*columns.values()], dtype=torch.float64))
        totals = dict(zip(columns, summed.tolist(), strict=True))
        rows = max(totals["rows"], 1.0)
        loss = totals["loss"] / rows
        norm = self._prepare_gradients()
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not skipped:
            self._update(norm, number, lr)
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(
            loss=loss,
            skipped=skipped,
            parts={name: totals[name] / rows for name in self._objective.part_names},
            accuracy=totals["right"] / rows,
            rows=int(totals["rows"]),
            tokens=int(totals["tokens"]),
            gradient_norm=norm,
            seconds=time.perf_counter() - begin,
            decisions_2K=self._group.sum(sum(one.decisions_2K.double() for one in found)).cpu(),
        )

    def _forward(self, batch: DraftBatch, number: int, index: int, progress: float) -> Sums:
        """Run batch `index` of a step with its own random sources."""
        place = (self._config.run.seed, number, index)
        device, loss = self._group.device, self._config.loss
        is_gated = self.head_config.compressor_spec.gated
        noise = make_generator(device, "noise", *place) if loss.noise else None
        gate = make_generator(device, "gate", *place) if is_gated else None
        with torch.autocast(device.type, torch.bfloat16, self._autocast):
            sums: Sums = self._replica(batch, noise, gate, loss.temperature(progress))
        return sums

    def _gradients(self) -> list[Tensor]:
        return [w.grad for w in self._state["weights"].values() if w.grad is not None]

    def _prepare_gradients(self) -> float:
        """Scale gradients of the sum to a mean; return their norm."""
        gradients = self._gradients()
        if len(gradients) < len(self._state["weights"]):
            raise ViSpecError(
                "weights of the draft got no gradient: whatever wraps it trains something else"
            )
        for gradient in gradients:
            # Processes hand out means over themselves.
            gradient.mul_(self._group.world / self._step_rows)
        return float(whole(nn.utils.get_total_norm(gradients)))

    def _update(self, norm: float, number: int, lr: float) -> None:
        """Clip gradients of this norm, then step."""
        settings, weights = self._config.optimizer, self._state["weights"]
        for gradient in self._gradients():
            if settings.clip == "value":
                gradient.clamp_(-settings.clip_at, settings.clip_at)
            elif settings.clip == "norm":
                gradient.mul_(min(1.0, settings.clip_at / (norm + 1e-6)))
        for options in self._optimizer.param_groups:
            options["lr"] = lr
        self._optimizer.step()
        decay = min(settings.ema, (1 + number) / (_EMA_DELAY + number))
        for name, mean in self._state["average"].items():
            mean.lerp_(weights[name].detach(), 1 - decay)

    def weights_for_use(self) -> Tensors:
        """Return the full weights to validate and export: the average if there is one.

        All processes must call this together.
        """
        chosen = self._state["average"] or self._state["weights"]
        return {name: whole(w) for name, w in chosen.items()}

    def draft_with(self, weights: Mapping[str, Tensor]) -> Draft:
        """Return a separate draft with these weights, for validation and export.

        Args:
            weights: of `weights_for_use` or a checkpoint.
        """
        draft = self._objective.draft.blank()
        whole = {**self._frozen, **self._units.to_target(weights, self.head_config)}
        assign(dict(draft.named_parameters()), whole)
        return draft.to(self._group.device).eval()

    @property
    def state_bytes(self) -> int:
        """Size of a checkpoint."""
        return sum(one.nbytes for tensors in self._state.values() for one in tensors.values())

    def state(self) -> dict[str, Tensors]:
        """Return full tensors, on the CPU, of everything that the next step depends on.

        All processes must call this together.
        """
        return {
            group: {name: whole(tensor).cpu() for name, tensor in tensors.items()}
            for group, tensors in self._state.items()
        }

    def restore(self, groups: Mapping[str, Tensors], steps: int) -> None:
        """Continue from a saved state after this many updates of the weights.

        Raises:
            ViSpecError: it belongs to a head of another shape.
        """
        saved, ours = groups["weights"], self._state["weights"]
        if {n: t.shape for n, t in saved.items()} != {n: w.shape for n, w in ours.items()}:
            raise ViSpecError(
                "the checkpoint in run.output belongs to a head of another shape: choose another "
                "run.output"
            )
        for group, tensors in self._state.items():
            # An average that is new starts from the weights.
            assign(tensors, groups.get(group) or saved)
        for state in self._optimizer.state.values():
            state["step"].fill_(steps)
