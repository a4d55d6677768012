"""Losses on the counted rows of a pass, as weighted sums of terms.

A term is a mean over rows; a loss is a name for a set of weights, and any weight can be changed or
added. Softmaxes are computed in float32. Without a row every term is zero, with zero gradients.

Tensor names end in their shape: N rows, D hidden, V vocabulary, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from vllm_vispec.utils.errors import ViSpecError

RANKS = 10


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


Loss = Callable[[LossInputs], dict[str, Tensor]]
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


@dataclass(frozen=True)
class WeightedLoss:
    """A sum of terms; calling it returns every part and their weighted "total" (all scalars)."""

    weights: Mapping[str, float]

    def __call__(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Means over rows of every term with a weight, unweighted, and "total"."""
        # Empty sums keep the graph: without a row all gradients are zero instead of missing.
        total = inputs.draft_state_ND[:0].float().sum() + inputs.draft_logits_NV[:0].float().sum()
        parts: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            rows_N = TERMS[name](inputs)
            parts[name] = rows_N.sum() / max(len(rows_N), 1)
            total = total + weight * parts[name]
        return parts | {"total": total}


def get_loss(name: str, **weights: float) -> WeightedLoss:
    """The loss `name` of `LOSSES`, some weights changed or terms of `TERMS` added (0: left out).

    Raises:
        ViSpecError: the loss or a term is unknown, a weight is negative, or nothing is left.
    """
    if name not in LOSSES:
        raise ViSpecError(f"loss {name!r} is unknown: use one of {', '.join(LOSSES)}")
    for term, weight in weights.items():
        if term not in TERMS:
            raise ViSpecError(
                f"loss term {term!r} is unknown: give weights of {', '.join(TERMS)} only"
            )
        if not weight >= 0:
            raise ViSpecError(f"weight {term}={weight} of the loss is negative: use 0 or more")
    merged = {**LOSSES[name], **weights}
    chosen = {term: float(weight) for term, weight in merged.items() if weight > 0}
    if not chosen:
        raise ViSpecError(f"all weights of loss {name!r} are 0: give one of them a value")
    return WeightedLoss(chosen)
