"""Rules by which draft trees grow: which candidates stay, and which of them are expanded.

A policy judges the children that the last draft pass proposes.  It returns two scores for each:
one for its place in the finished tree, one for its place among the nodes to expand.  Minus
infinity keeps it out, and with it all that would grow from it.

Shapes: R requests, W expanded nodes, C children proposed for each.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_vispec.trees.settings import TreeSettings

NEVER = float("-inf")


# Scores ``[R, W, C]`` for staying in the tree and for being expanded.
Judgement = tuple[torch.Tensor, torch.Tensor]


class Eagle2:
    """EAGLE-2's rule: the most likely paths are expanded, the most likely nodes stay.

    Other rules are its subclasses.

    Attributes:
        num_observed: How many tokens behind the root the rule looks at.
    """

    num_observed = 1

    def __init__(self, settings: "TreeSettings") -> None:
        self.levels, self.top_k = settings.levels, settings.top_k
        self.threshold = settings.least_probability

    def observe(self, root_logp: torch.Tensor) -> torch.Tensor:
        """Sum up what the draft says behind the root; handed to `judge`.

        Args:
            root_logp: float32 ``[R, num_observed]``; log-probabilities of the likeliest tokens, the
                likeliest first.
        """
        return root_logp

    def judge(
        self,
        level: int | torch.Tensor,
        score: torch.Tensor,
        parent_score: torch.Tensor,
        observed: torch.Tensor,
        /,
    ) -> Judgement:
        """Score the children that a draft pass proposes, here by the probability of their paths.

        Args:
            level: 1 for children of the root; int64 ``[]`` where graphs read it.
            score: float32 ``[R, W, C]``; log-probability of the path down to the child, the
                likeliest child first.
            parent_score: float32 ``[R, W]``; the same of its parent, 0 for the root.
            observed: What `observe` returned.
        """
        return score, score


class SpecLlava(Eagle2):
    """Spec-LLaVA's rule as far as it is public: expand and prune by cumulative confidence.

    A path less likely than the threshold ends.  The paper gives no number; its authors' code has a
    node budget alone.
    """

    def judge(
        self, level: int | torch.Tensor, score: torch.Tensor, /, *_: torch.Tensor
    ) -> Judgement:
        """Score by the path's probability, and leave out what falls below the threshold."""
        low = score < (math.log(self.threshold) if self.threshold else NEVER)
        score = score.masked_fill(low, NEVER)
        return score, score


class Entropy(Eagle2):
    """SAGE's rule: a sure draft grows deep, narrow trees, an unsure one shallow, wide ones.

    ``alpha = 1 - H / log 10``, H being the entropy of the ten likeliest tokens behind the root, is
    1 for a sure draft.  Depth is ``least + alpha * (levels - least)`` and width ``2 + (1 - alpha) *
    (top_k - 2)``; at level l a node may have ``width / l * (0.5 + p)`` children, p being the
    probability of its path, and is expanded if p exceeds ``threshold * l / depth``.
    """

    num_observed = 10
    least_levels, least_width = 3, 2

    def observe(self, root_logp: torch.Tensor) -> torch.Tensor:
        """Return alpha, ``[R, 1, 1]``."""
        entropy_R1 = torch.special.entr(root_logp.log_softmax(-1).exp()).sum(-1, keepdim=True)
        return (1 - entropy_R1 / math.log(self.num_observed)).clamp(0, 1).unsqueeze(-1)

    def judge(
        self,
        level: int | torch.Tensor,
        score: torch.Tensor,
        parent_score: torch.Tensor,
        observed: torch.Tensor,
        /,
    ) -> Judgement:
        """Score by the path's probability, within the width and depth the entropy allows."""
        least_levels = min(self.least_levels, self.levels)
        depth_R11 = least_levels + observed * (self.levels - least_levels)
        width_R11 = self.least_width + (1 - observed) * max(self.top_k - self.least_width, 0)
        share_RW1 = 0.5 + parent_score.exp().unsqueeze(-1)
        allowed_RW1 = (width_R11 / level * share_RW1).round().clamp_(min=1)
        rank_C = torch.arange(score.shape[-1], device=score.device)
        # A level that is begun at all is part of the tree, as a rounded depth would have it.
        out = (rank_C >= allowed_RW1) | (level > depth_R11.round())
        keep_RWC = score.masked_fill(out, NEVER)
        low = keep_RWC.exp() <= self.threshold * level / depth_R11
        return keep_RWC, keep_RWC.masked_fill(low, NEVER)


# A chain is the most likely child of the most likely child.
POLICIES: Mapping[str, type[Eagle2]] = {
    "chain": Eagle2,
    "eagle2": Eagle2,
    "spec_llava": SpecLlava,
    "entropy": Entropy,
}
