"""The gate: which branches of a combination a request's drafts see.

It reads the target's state (after the final norm) at the last token of the prompt, which has seen
the question and the images and is computed in every prefill, prefix-cache hits included. (The paper
names no gate input; a mean over the question's tokens would not be at hand behind a cached prefix.)
Without a question, in a prompt that is one image, that token is the image's or the template's last.

The gate does not mix tokens: every branch keeps its tokens in the draft's cache, which requests
share, and the gate biases the scores of a branch's keys. So cached tokens never depend on a
question, and a decision costs nothing to change. A bias is one number per branch, 0 for a branch
that is seen as it is.

Tensor names end in their shape: G prompts, K branches, D hidden, F width of the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# exp(-1000) is 0 in every dtype; finite, so that a row without any other key stays a number.
HIDDEN_BIAS = -1000.0
# A branch that is weighted is never lost for good.
MIN_SHARE = 1e-4


@dataclass(frozen=True)
class GateOutput:
    """What the gate makes of prompts.

    Attributes:
        bias_GK: float32, added to the scores of the keys of each branch.
        share_GK: float32, softmax of the gate's logits.
        choice_G: int64, the branch with the largest logit, noise included.
    """

    bias_GK: Tensor
    share_GK: Tensor
    choice_G: Tensor


class Gate(nn.Module):
    """Linear - GELU - Linear over a state, a quarter as wide (the paper leaves the shape open)."""

    def __init__(self, hidden_size: int, num_branches: int) -> None:
        super().__init__()
        width = max(hidden_size // 4, 1)
        self.in_proj = nn.Linear(hidden_size, width)
        self.out_proj = nn.Linear(width, num_branches)

    def forward(self, state_GD: Tensor) -> Tensor:
        """Logits of the branches, float32 [G, K]."""
        hidden_GF = F.gelu(self.in_proj(state_GD.to(self.in_proj.weight.dtype)))
        return self.out_proj(hidden_GF).float()

    @torch.no_grad()
    def init_weights(self) -> None:
        """All branches alike at first."""
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)


def weigh(logits_GK: Tensor, noise_GK: Tensor | None, temperature: float) -> GateOutput:
    """Weighted: a branch's keys count as often as the gate says; noise is not used."""
    share_GK = logits_GK.softmax(-1)
    return GateOutput(share_GK.clamp_min(MIN_SHARE).log(), share_GK, logits_GK.argmax(-1))


def choose(logits_GK: Tensor, noise_GK: Tensor | None, temperature: float) -> GateOutput:
    """Select: only the first branch is seen.

    With Gumbel noise (training) the branch is drawn, and gradients are those of the softmax at
    `temperature`, straight through.
    """
    noisy_GK = logits_GK if noise_GK is None else logits_GK + noise_GK
    soft_GK = (noisy_GK / temperature).softmax(-1)
    choice_G = noisy_GK.argmax(-1)
    hard_GK = F.one_hot(choice_G, logits_GK.shape[-1]).to(soft_GK)
    # In value 1 where chosen; in gradient the soft share.
    straight_GK = torch.where(hard_GK > 0, 1 - soft_GK.detach() + soft_GK, 1.0)
    bias_GK = torch.where(hard_GK > 0, straight_GK.log(), HIDDEN_BIAS)
    return GateOutput(bias_GK, logits_GK.softmax(-1), choice_G)


Decide = Callable[[Tensor, Tensor | None, float], GateOutput]
# How a gated combination turns logits into biases; an entry per gated one in `spec.COMBINATIONS`.
DECISIONS: Mapping[str, Decide] = {"weighted": weigh, "select": choose}


def gumbel_noise(like_GK: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gumbel noise of the shape and device of logits."""
    device = like_GK.device if generator is None else generator.device
    uniform = torch.rand(like_GK.shape, generator=generator, device=device).to(like_GK.device)
    return -(-uniform.clamp(1e-9, 1 - 1e-7).log()).log()


def balance(output: GateOutput) -> Tensor:
    """Load balance: K * sum of share of decisions times mean share; 1 if even, K if one wins."""
    count = output.share_GK.shape[-1]
    chosen_K = F.one_hot(output.choice_G, count).to(output.share_GK).mean(0)
    return count * (chosen_K * output.share_GK.mean(0)).sum()
