"""What is minimised: loss terms, their weights, and the draft with its loss over rollout passes.

A term is a number per counted row. A loss is a name for a set of weights; any weight can be changed
or added. Softmaxes are computed in float32. Sums over rows instead of means: divided by the rows of
the whole step, the result does not depend on how the step's samples are spread over forward passes
and processes.

Tensor names end in their shape: B samples, L rows, N counted rows, D hidden, V vocabulary, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vllm_vispec.compressors.gate import balance
from vllm_vispec.reference import Decision, Draft, ViSpecDraft, decide
from vllm_vispec.train.acceptance import sum_decisions
from vllm_vispec.train.config import LossSettings
from vllm_vispec.train.memory import part
from vllm_vispec.train.rollout import PassOutput, rollout
from vllm_vispec.train.target import DraftBatch
from vllm_vispec.train.units import Units
from vllm_vispec.utils.errors import ViSpecError

RANKS = 10
# The load-balance term, among the parts of a loss.
BALANCE = "balance"


@dataclass(frozen=True)
class LossInputs:
    """Counted rows of a pass.

    Attributes:
        draft_state_ND: the draft's output.
        target_state_ND: the target's state at the next token (hidden p + 1 for row p).
        draft_logits_NV, target_logits_NV: the target's lm_head over both.
        gold_N: int64, the answer's token.
    """

    draft_state_ND: Tensor
    target_state_ND: Tensor
    draft_logits_NV: Tensor
    target_logits_NV: Tensor
    gold_N: Tensor


Term = Callable[[LossInputs], Tensor]


def l1_of_probabilities(inputs: LossInputs) -> Tensor:
    """Per row the sum over V of |q - p|: twice the rejection rate of speculative sampling."""
    draft_NV = inputs.draft_logits_NV.float().softmax(-1)
    target_NV = inputs.target_logits_NV.float().softmax(-1)
    return (draft_NV - target_NV).abs().sum(-1)


def list_mle(inputs: LossInputs) -> Tensor:
    """Per row the negative log likelihood of the target's order of its top 10 tokens.

    Plackett-Luce under the draft's logits, summed over ranks (ListMLE, Xia et al. 2008; ViSpec's
    code uses it over the target's top 10).
    """
    ranks = min(RANKS, inputs.target_logits_NV.shape[-1])
    order_NR = inputs.target_logits_NV.topk(ranks, dim=-1).indices
    scores_NR = inputs.draft_logits_NV.gather(-1, order_NR).float()
    # Each rank is drawn from the tokens that are left: its own and the lower ones.
    left_NR = scores_NR.flip(-1).logcumsumexp(-1).flip(-1)
    return (left_NR - scores_NR).sum(-1)


def smooth_l1_of_states(inputs: LossInputs) -> Tensor:
    """Per row the mean over D of Smooth L1 (beta 1) between the states (EAGLE, section 4.1)."""
    return F.smooth_l1_loss(
        inputs.draft_state_ND.float(), inputs.target_state_ND.float(), reduction="none"
    ).mean(-1)


def soft_cross_entropy(inputs: LossInputs) -> Tensor:
    """Per row -sum over V of p log q with the target's p."""
    target_NV = inputs.target_logits_NV.float().softmax(-1)
    return -(target_NV * inputs.draft_logits_NV.float().log_softmax(-1)).sum(-1)


def kl_divergence(inputs: LossInputs) -> Tensor:
    """Per row KL(p || q): the soft cross entropy less the target's own entropy."""
    target_NV = inputs.target_logits_NV.float().log_softmax(-1)
    draft_NV = inputs.draft_logits_NV.float().log_softmax(-1)
    return (target_NV.exp() * (target_NV - draft_NV)).sum(-1)


def gold_cross_entropy(inputs: LossInputs) -> Tensor:
    """Per row the cross entropy with the answer's token."""
    return F.cross_entropy(inputs.draft_logits_NV.float(), inputs.gold_N, reduction="none")


TERMS: Mapping[str, Term] = {
    "l1": l1_of_probabilities,
    "rank": list_mle,
    "feature": smooth_l1_of_states,
    "ce": soft_cross_entropy,
    "kl": kl_divergence,
    "gold": gold_cross_entropy,
}

# Terms that compare the draft's states with the target's.
STATE_TERMS = frozenset({"feature"})

# Weights as published; sources beside them.
LOSSES: Mapping[str, Mapping[str, float]] = {
    # ViSpec's code, stage 2: L1 of probabilities and ListMLE, no feature term.
    "vispec": {"l1": 10.0, "rank": 0.1},
    # ViSpec's code, stage 1: EAGLE's loss with a ranking term inside its token term.
    "vispec_text": {"feature": 1.0, "ce": 0.1, "rank": 0.01},
    # EAGLE (arXiv 2401.15077), section 4.1: w_cls = 0.1.
    "eagle": {"feature": 1.0, "ce": 0.1},
    # SpecVLM (arXiv 2509.11815), section 3.5: online logits, teacher in the same step.
    "specvlm": {"feature": 1.0, "ce": 0.1},
    "kl": {"kl": 1.0},
}


def term_weights(name: str, changes: Mapping[str, float]) -> dict[str, float]:
    """The weights of a loss, some of them changed or terms of `TERMS` added (0: left out).

    Raises:
        ViSpecError: the loss or a term is unknown, a weight is negative, or nothing is left.
    """
    if name not in LOSSES:
        raise ViSpecError(f"loss.name is {name!r}: use one of auto, {', '.join(LOSSES)}")
    for term, weight in changes.items():
        if term not in TERMS:
            raise ViSpecError(
                f"loss term {term!r} is unknown: give weights of {', '.join(TERMS)} only"
            )
        if not weight >= 0:
            raise ViSpecError(f"weight {term}={weight} of the loss is negative: use 0 or more")
    merged = {**LOSSES[name], **changes}
    chosen = {term: float(weight) for term, weight in merged.items() if weight > 0}
    if not chosen:
        raise ViSpecError(f"all weights of loss {name!r} are 0: give one of them a value")
    return chosen


def sum_terms(inputs: LossInputs, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Sums over rows of every term with a weight, unweighted, and their weighted "total".

    Without a row all are zero, with zero gradients.
    """
    sums = {name: TERMS[name](inputs).sum() for name in weights}
    # Empty sums keep the graph: without a row gradients are zero instead of missing.
    total = inputs.draft_state_ND[:0].float().sum() + inputs.draft_logits_NV[:0].float().sum()
    for name, weight in weights.items():
        total = total + weight * sums[name]
    return sums | {"total": total}


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
        of_rows: sums over the rows of pass 0 (detached scalars): "rows" counts them, "right" those
            whose most likely token is the answer's; one more for each of `Objective.part_names`.
        decisions_2K: see `acceptance.sum_decisions`.
    """

    loss: Tensor
    of_rows: dict[str, Tensor]
    decisions_2K: Tensor


class Objective(nn.Module):
    """The draft and its loss as one module: gradients of the processes meet behind its backward.

    Args:
        units: what the draft computes in; None: the target's own.
    """

    def __init__(
        self, draft: Draft, lm_head_VD: Tensor, settings: LossSettings, units: Units | None = None
    ) -> None:
        super().__init__()
        self.units = units or Units()
        self.draft = draft
        self.settings = settings
        # Detached: a parameter would be registered and trained.
        self.lm_head_VD = lm_head_VD.detach()
        self.weights = term_weights(settings.name, settings.weights)
        self.balance = settings.balance if draft.config.compressor_spec.balanced else 0.0
        self._compute_rows = self._rows
        self.part_names = (*self.weights, *([BALANCE] if self.balance else []))

    def compile_parts(self) -> None:
        """Have kernels made of what all samples need: the layer of a head, and the loss of rows.

        The rest is called once a pass, with shapes that no two batches share.
        """
        if isinstance(self.draft, ViSpecDraft):
            self.draft.layer.compile(dynamic=True)
        self._compute_rows = torch.compile(self._rows, dynamic=True)

    def forward(
        self,
        batch: DraftBatch,
        noise: torch.Generator | None = None,
        gate: torch.Generator | None = None,
        temperature: float = 1.0,
    ) -> Sums:
        """Return the loss of a batch on the draft's device, in its dtype (or under autocast).

        Args:
            noise, gate: sources of the noise on the target's states and of the Gumbel noise on a
                gate's logits; None: nothing is drawn.
            temperature: of the softmax that the gate's gradients go through.
        """
        settings = self.settings
        batch = self.units.of_batch(batch)
        decision = decide(
            self.draft.compressor,
            batch.hidden_BLD,
            batch.answer_BL,
            batch.runs,
            gate,
            temperature,
        )
        outputs = rollout(
            self.draft,
            batch,
            self.draft.distinct_passes(settings.passes),
            settings.mode,
            settings.noise / self.units.state,
            noise,
            decision,
        )
        # A term without weight on every parameter: all get gradients (zeros) even where a batch
        # has no image, so that optimiser and processes treat every step alike.
        trained = (p for p in self.draft.parameters() if p.requires_grad)
        loss = batch.hidden_BLD.new_zeros((), dtype=torch.float32)
        loss = sum((p.flatten()[:1].sum() * 0 for p in trained), loss)
        passes = []
        for number, output in enumerate(outputs):
            with part(f"the logits of rollout pass {number}"):
                passes.append(self._pass(output, batch))
            loss = loss + settings.pass_decay**number * passes[-1]["total"]
        rows = outputs[0].counts_BL.sum()
        of_rows = {"rows": rows} | {k: v.detach() for k, v in passes[0].items() if k != "total"}
        if self.balance:
            # A mean over the pass's turns, not a sum over rows: passes count by their rows.
            even = rows * self._balance(decision)
            loss = loss + self.balance * even
            of_rows[BALANCE] = even.detach()
        return Sums(loss, of_rows, sum_decisions(decision))

    def _balance(self, decision: Decision | None) -> Tensor:
        """The load balance over the turns that see an image; zero without any."""
        if decision is None or not bool(decision.sees_G.any()):
            return self.lm_head_VD.new_zeros((), dtype=torch.float32)
        return balance(decision.of_images())

    def _pass(self, output: PassOutput, batch: DraftBatch) -> dict[str, Tensor]:
        counts_BL = output.counts_BL
        rows = (
            output.state_BLD[counts_BL],
            F.pad(batch.hidden_BLD[:, 1:], (0, 0, 0, 1))[counts_BL],
            F.pad(batch.ids_BL[:, 2:], (0, 2))[counts_BL],
        )
        size = self.settings.chunk_rows
        if len(rows[0]) <= size:
            return self._compute_rows(*rows)
        sums: dict[str, Tensor] = {}
        for chunk in zip(*(x.split(size) for x in rows), strict=True):
            found = self._without_logits(*chunk)
            sums = {name: sums[name] + v if sums else v for name, v in found.items()}
        return sums

    def _without_logits(
        self, state_ND: Tensor, goal_ND: Tensor, gold_N: Tensor
    ) -> dict[str, Tensor]:
        """Compute rows of which no logits are held for the backward pass."""
        if self.draft.output_head(self.lm_head_VD).requires_grad:
            return checkpoint(self._compute_rows, state_ND, goal_ND, gold_N, use_reentrant=False)
        # The states alone learn from these rows: with their gradient, computed at once, nothing is
        # computed again.
        leaf_ND = state_ND.detach().requires_grad_()
        with torch.enable_grad():
            found = self._compute_rows(leaf_ND, goal_ND, gold_N)
            (gradient_ND,) = torch.autograd.grad(found["total"], leaf_ND)
        sums = {name: one.detach() for name, one in found.items()}
        return sums | {"total": _Known.apply(sums["total"], state_ND, gradient_ND)}

    def _rows(self, state_ND: Tensor, goal_ND: Tensor, gold_N: Tensor) -> dict[str, Tensor]:
        # Losses and the lm_head know the target's own units.
        state_ND, goal_ND = state_ND * self.units.state, goal_ND * self.units.state
        head_VD = self.draft.output_head(self.lm_head_VD)
        draft_NV = F.linear(state_ND.to(head_VD.dtype), head_VD)
        with torch.no_grad():
            # A published model's table may be padded less.
            target_VD = self.lm_head_VD[: len(head_VD)]
            target_NV = F.linear(goal_ND.to(target_VD.dtype), target_VD)
        inputs = LossInputs(state_ND, goal_ND, draft_NV, target_NV, gold_N)
        right = (draft_NV.detach().argmax(-1) == gold_N).sum()
        return sum_terms(inputs, self.weights) | {"right": right}


class _Known(torch.autograd.Function):
    """A number whose gradient is known: `forward(number, of what, gradient)`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, _: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, above[0].to(gradient.dtype) * gradient, None
