"""The draft with its loss: rollout passes, logits and loss terms of a batch, as sums over rows.

Sums instead of means: divided by the rows of the whole step, the result does not depend on how the
step's samples are spread over forward passes and processes.

Tensor names end in their shape: B samples, L rows, N counted rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vllm_vispec.compressors.gate import balance
from vllm_vispec.reference import Decision, Draft, decide
from vllm_vispec.train.batch import DraftBatch
from vllm_vispec.train.config import LossSettings
from vllm_vispec.train.losses import LossInputs, get_loss
from vllm_vispec.train.metrics import sum_decisions
from vllm_vispec.train.rollout import PassOutput, rollout

# The load-balance term, among the parts of a loss.
BALANCE = "balance"


@dataclass(frozen=True)
class Rng:
    """Random sources of one forward pass; None: nothing is drawn.

    Attributes:
        noise: of the noise on the target's states.
        gate: of the Gumbel noise on a gate's logits.
        temperature: of the softmax that the gate's gradients go through.
    """

    noise: torch.Generator | None = None
    gate: torch.Generator | None = None
    temperature: float = 1.0


NO_RNG = Rng()


def make_generator(device: torch.device, purpose: str, *place: int) -> torch.Generator:
    """Return a generator for a purpose at a place: seed, step, pass and process.

    It depends on nothing else, so a resumed run draws the same.
    """
    name = " ".join(map(str, (purpose, *place)))
    return torch.Generator(device).manual_seed(Random(name).getrandbits(62))


@dataclass(frozen=True)
class Sums:
    """Sums of one forward pass.

    Attributes:
        loss: sum over passes and rows of the weighted loss (with gradients).
        rows: counted rows of pass 0, what the step's sum is divided by.
        parts: sums of every loss term over the rows of pass 0 (detached).
        right: rows of pass 0 whose most likely token is the answer's.
        decisions: see `metrics.sum_decisions`; empty for a head without a gate.
    """

    loss: Tensor
    rows: int
    parts: dict[str, Tensor]
    right: Tensor
    decisions: Tensor


class Objective(nn.Module):
    """One module around the draft, so that sharding gathers it before anything reads it."""

    def __init__(self, draft: Draft, lm_head_VD: Tensor, settings: LossSettings) -> None:
        super().__init__()
        self.draft = draft
        self.settings = settings
        # Detached: a parameter would be registered, trained and sharded.
        self.lm_head_VD = lm_head_VD.detach()
        self.loss = get_loss(settings.name, **settings.weights)
        self.balance = settings.balance if draft.config.compressor_spec.balanced else 0.0
        self.part_names = (*self.loss.weights, *([BALANCE] if self.balance else []))

    def forward(self, batch: DraftBatch, rng: Rng = NO_RNG) -> Sums:
        """Return the loss of a batch on the draft's device, in its dtype (or under autocast)."""
        decision = decide(
            self.draft.compressor,
            batch.hidden_BLD,
            batch.answer_BL,
            batch.runs,
            rng.gate,
            rng.temperature,
        )
        outputs = rollout(
            self.draft,
            batch,
            self.draft.distinct_passes(self.settings.passes),
            self.settings.mode,
            self.settings.noise,
            rng.noise,
            decision,
        )
        # A term without weight on every parameter: all get gradients (zeros) even where a batch
        # has no image, so that optimiser and sharding treat every step alike.
        total = sum((p.flatten()[:1].sum() * 0 for p in self.trained()), torch.zeros(()))
        total = total.to(batch.hidden_BLD.device)
        first: dict[str, Tensor] = {}
        for number, output in enumerate(outputs):
            sums = self._pass(output, batch)
            total = total + self.settings.pass_decay**number * sums["total"]
            first = first or sums
        rows = int(outputs[0].counts_BL.sum())
        parts = {name: value.detach() for name, value in first.items() if name != "right"}
        if self.balance:
            # A mean over the pass's turns, not a sum over rows: passes count by their rows.
            even = rows * self._balance(decision)
            total = total + self.balance * even
            parts[BALANCE] = even.detach()
        return Sums(total, rows, parts, first["right"], _sum_decisions(decision))

    def _balance(self, decision: Decision | None) -> Tensor:
        """The load balance over the turns that see an image; zero without any."""
        if decision is None or not bool(decision.sees_G.any()):
            return self.lm_head_VD.new_zeros((), dtype=torch.float32)
        return balance(decision.of_images())

    def trained(self) -> list[nn.Parameter]:
        """Parameters that are trained (the embedding table is not)."""
        return [p for p in self.draft.parameters() if p.requires_grad]

    def _pass(self, output: PassOutput, batch: DraftBatch) -> dict[str, Tensor]:
        counts_BL = output.counts_BL
        state_ND = output.state_BLD[counts_BL]
        goal_ND = F.pad(batch.hidden_BLD[:, 1:], (0, 0, 0, 1))[counts_BL]
        gold_N = F.pad(batch.ids_BL[:, 2:], (0, 2))[counts_BL]
        size = self.settings.chunk_rows
        if len(state_ND) <= size:
            return self._rows(state_ND, goal_ND, gold_N)
        sums: dict[str, Tensor] = {}
        pieces = (x.split(size) for x in (state_ND, goal_ND, gold_N))
        for piece in zip(*pieces, strict=True):
            # Logits are computed again in the backward pass: only one chunk's are ever held.
            found = checkpoint(self._rows, *piece, use_reentrant=False)
            sums = {name: sums[name] + v if sums else v for name, v in found.items()}
        return sums

    def _rows(self, state_ND: Tensor, goal_ND: Tensor, gold_N: Tensor) -> dict[str, Tensor]:
        head_VD = self.draft.output_head(self.lm_head_VD)
        draft_NV = F.linear(state_ND.to(head_VD.dtype), head_VD)
        with torch.no_grad():
            target_NV = F.linear(goal_ND.to(self.lm_head_VD.dtype), self.lm_head_VD)
        means = self.loss(LossInputs(state_ND, goal_ND, draft_NV, target_NV, gold_N))
        sums = {name: mean * len(gold_N) for name, mean in means.items()}
        sums["right"] = (draft_NV.detach().argmax(-1) == gold_N).sum()
        return sums


def _sum_decisions(decision: Decision | None) -> Tensor:
    return torch.zeros(0) if decision is None else sum_decisions(decision.of_images())
