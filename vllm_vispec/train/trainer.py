"""The trainer: one optimizer step, and the state that is carried from step to step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_vispec.reference import Draft, draft_class
from vllm_vispec.train.batch import pad_batch
from vllm_vispec.train.checkpoint import Tensors
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.distributed import Processes, assign, like, shard, whole
from vllm_vispec.train.metrics import GateDecisions
from vllm_vispec.train.objective import Objective, Rng, Sums, make_generator
from vllm_vispec.train.optimizer import CLIPS, make_optimizer, total_norm
from vllm_vispec.train.rollout import ROW_MULTIPLE
from vllm_vispec.train.teacher import Teacher
from vllm_vispec.utils.errors import ViSpecError

# An average of few steps would still hold mostly the start: its decay grows as (1 + t) / (10 + t).
_EMA_DELAY = 10


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
        seconds: of this process.
        decisions: of the head's gate, if it has one.
    """

    loss: float
    parts: Mapping[str, float]
    accuracy: float
    rows: int
    tokens: int
    gradient_norm: float
    seconds: float
    decisions: GateDecisions = field(default_factory=GateDecisions)


class Trainer:
    """A draft in training on one process of the run."""

    def __init__(
        self, config: TrainConfig, draft: Draft, teacher: Teacher, group: Processes
    ) -> None:
        self._config, self._teacher, self._group = config, teacher, group
        self.head_config = draft.config
        objective = Objective(draft, teacher.facts.lm_head_VD, config.loss).to(group.device)
        # Before sharding, so that one process alone can export them.
        self._frozen: Tensors = {
            name: w.detach() for name, w in draft.named_parameters() if not w.requires_grad
        }
        shard(objective, group)
        self._objective = objective
        self._weights = {
            name: weight
            for name, weight in objective.draft.named_parameters()
            if weight.requires_grad
        }
        self._optimizer = make_optimizer(config.optimizer, self._weights.values(), group)
        self._average: Tensors = {}
        if config.optimizer.ema:
            self._average = {name: w.detach().clone() for name, w in self._weights.items()}
        autocast = config.run.autocast
        self._autocast = autocast == "bfloat16" or (
            autocast == "auto" and group.device.type == "cuda"
        )

    def step(
        self, passes: Sequence[Sequence[int]], number: int, lr: float, progress: float = 0.0
    ) -> StepResult:
        """Train on this process's samples of a step.

        Args:
            passes: samples of each forward pass, by index in the corpus.
            number: finished steps before this one.
            lr: learning rate.
            progress: share of the run that is over when the step is done, 0 to 1.

        Raises:
            ViSpecError: the loss is not finite.
        """
        begin, tokens = time.perf_counter(), 0
        found: list[Sums] = []
        for index, samples in enumerate(passes):
            batch = pad_batch(self._teacher.observe(samples), ROW_MULTIPLE)
            batch = batch.to(self._group.device, torch.float32)
            tokens += sum(batch.lengths)
            with torch.autocast(self._group.device.type, torch.bfloat16, self._autocast):
                sums = self._objective(batch, self._rng(number, index, progress))
            sums.loss.backward()
            found.append(sums)
        totals = self._totals(found, tokens)
        rows = max(totals["rows"], 1.0)
        loss = totals["total"] / rows
        if not torch.isfinite(torch.tensor(loss)):
            raise ViSpecError(
                f"the loss of step {number + 1} is {loss}: lower optimizer.lr or set optimizer.clip"
            )
        norm = self._update(rows, number, lr)
        return StepResult(
            loss=loss,
            parts={name: totals[f"part.{name}"] / rows for name in self._objective.part_names},
            accuracy=totals["right"] / rows,
            rows=int(totals["rows"]),
            tokens=int(totals["tokens"]),
            gradient_norm=norm,
            seconds=time.perf_counter() - begin,
            decisions=GateDecisions.from_sums(
                [value for name, value in totals.items() if name.startswith("decision.")]
            ),
        )

    def _rng(self, number: int, index: int, progress: float) -> Rng:
        """Random sources of a forward pass; validation and export have none."""
        place = (self._config.run.seed, number, index, self._group.rank)
        device, loss = self._group.device, self._config.loss
        is_gated = self.head_config.compressor_spec.gated
        return Rng(
            make_generator(device, "noise", *place) if loss.noise else None,
            make_generator(device, "gate", *place) if is_gated else None,
            loss.temperature(progress),
        )

    def _totals(self, found: Sequence[Sums], tokens: int) -> dict[str, float]:
        """Sums over forward passes and processes."""
        names = self._objective.part_names
        columns = {
            "rows": [torch.tensor(float(one.rows)) for one in found],
            "tokens": [torch.tensor(float(tokens))],
            "total": [one.loss.detach() for one in found],
            "right": [one.right for one in found],
            **{f"part.{name}": [one.parts[name] for one in found] for name in names},
            **{
                f"decision.{index}": [one.decisions[index] for one in found]
                for index in range(len(found[0].decisions))
            },
        }
        summed = [sum(float(v) for v in values) for values in columns.values()]
        totals = self._group.sum(torch.tensor(summed, dtype=torch.float64))
        return dict(zip(columns, totals.tolist(), strict=True))

    def _update(self, rows: float, number: int, lr: float) -> float:
        """Scale gradients of the sum to the mean, clip, step; return the norm before clipping."""
        gradients = [w.grad for w in self._weights.values() if w.grad is not None]
        for gradient in gradients:
            # Sharding hands out means over processes.
            gradient.mul_(self._group.world / rows)
        norm = total_norm(gradients)
        settings = self._config.optimizer
        CLIPS[settings.clip](gradients, settings.clip_at)
        for options in self._optimizer.param_groups:
            options["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        decay = min(settings.ema, (1 + number) / (_EMA_DELAY + number))
        for name, mean in self._average.items():
            mean.lerp_(self._weights[name].detach(), 1 - decay)
        return norm

    def weights_for_use(self) -> Tensors:
        """Return the full weights to validate and export: the average if there is one.

        All processes must call this together.
        """
        return {name: whole(w) for name, w in (self._average or self._weights).items()}

    def draft_with(self, weights: Mapping[str, Tensor]) -> Draft:
        """Return a separate draft with these weights, for validation and export."""
        draft = draft_class(self.head_config)(self.head_config)
        draft.load_state_dict({**self._frozen, **weights})
        return draft.to(self._group.device).eval()

    def state(self) -> dict[str, Tensors]:
        """Return full tensors of everything that the next step depends on.

        All processes must call this together.
        """
        groups: dict[str, Tensors] = {
            "weights": {name: whole(w).cpu() for name, w in self._weights.items()}
        }
        for group, key in _MOMENTS.items():
            groups[group] = {
                name: whole(self._optimizer.state[w][key]).cpu()
                for name, w in self._weights.items()
                if w in self._optimizer.state
            }
        groups["average"] = {name: whole(w).cpu() for name, w in self._average.items()}
        return groups

    def restore(self, groups: Mapping[str, Tensors], steps: int) -> None:
        """Continue from a saved state after this many steps.

        Raises:
            ViSpecError: it belongs to a head of another shape.
        """
        weights = groups.get("weights", {})
        if {n: t.shape for n, t in weights.items()} != {
            n: w.shape for n, w in self._weights.items()
        }:
            raise ViSpecError(
                "the checkpoint in run.output belongs to a head of another shape: choose another "
                "run.output"
            )
        assign(self._weights, weights)
        if self._average:
            assign(self._average, groups.get("average") or weights)
        for name, weight in self._weights.items() if steps else ():
            state = {key: like(weight.detach(), groups[g][name]) for g, key in _MOMENTS.items()}
            self._optimizer.state[weight] = {
                # PyTorch keeps the count beside the moments when it fuses, else on the CPU.
                "step": torch.tensor(float(steps)),
                **state,
            }
        for state in self._optimizer.state.values() if self._group.device.type == "cuda" else ():
            state["step"] = state["step"].to(self._group.device)


_MOMENTS = {"moment1": "exp_avg", "moment2": "exp_avg_sq"}
