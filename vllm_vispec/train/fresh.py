"""Fresh weights: what heads of all kinds start from.

Tensor names end in their shape: V vocabulary, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.reference import DraftVlm

# Times in_features ** -0.5; the usual 0.02 at a width of about 1200.
WEIGHT_SCALE = 0.7


@torch.no_grad()
def start_linears(module: nn.Module, generator: torch.Generator) -> None:
    """Normal weights and zero biases in every linear layer."""
    for one in module.modules():
        if isinstance(one, nn.Linear):
            std = WEIGHT_SCALE * one.in_features**-0.5
            nn.init.normal_(one.weight, std=std, generator=generator)
            if one.bias is not None:
                nn.init.zeros_(one.bias)


@torch.no_grad()
def new_draft_vlm(
    config: HeadConfig, embed_VD: Tensor, seed: int, lm_head_VD: Tensor | None = None
) -> DraftVlm:
    """A fresh float32 draft VLM on the CPU; the same seed gives the same weights.

    All weights are normal, biases zero, norms one. At the target's width its tables start as the
    target's, which is worth many steps; they are trained like everything else.

    Args:
        embed_VD, lm_head_VD: the target's tables, of the target's width; None: not known.
    """
    draft = DraftVlm(config)
    generator = torch.Generator().manual_seed(seed)
    start_linears(draft, generator)
    # As long as what the projector makes of an image embedding: both are rows of one input.
    std = WEIGHT_SCALE * config.hidden_size**-0.5
    nn.init.normal_(draft.embed_tokens.weight, std=std, generator=generator)
    if embed_VD.shape == draft.embed_tokens.weight.shape:
        draft.embed_tokens.weight.copy_(embed_VD)
        if draft.lm_head is not None and lm_head_VD is not None:
            draft.lm_head.weight.copy_(lm_head_VD)
    return draft
