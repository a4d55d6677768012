"""Small random draft VLMs, in memory and on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.support.heads import BASE, random_tensors, write_head
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.reference import DraftVlm

# Narrower than the target's image embeddings, and with fewer key heads than query heads.
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_query_tokens": 1,
    "qkv_bias": True,
    "fc_bias": False,
    "layer0_input_norm": True,
    "final_norm": True,
    "global_feature": False,
    "compress": False,
    "num_hidden_layers": 3,
    "vision_size": 32,
}
DRAFT_VLM = replace(BASE, **SIZES)


def write_draft_vlm(folder: Path, **changes: Any) -> HeadConfig:
    """Write one with random weights; `changes` go to its `HeadConfig`. Returns that."""
    return write_head(folder, "canonical", **(SIZES | changes))


def random_draft_vlm(config: HeadConfig = DRAFT_VLM) -> DraftVlm:
    """One whose weights are all random, biases and norms included."""
    draft = DraftVlm(config)
    draft.load_state_dict(random_tensors(config))
    return draft.eval()


def random_prompt(length: int, width: int = 32, vocab: int = 64) -> tuple[torch.Tensor, ...]:
    """Token ids [L] and the target's input embeddings [L, width]."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(vocab, (length,), generator=generator)
    return ids, torch.randn(length, width, generator=generator)
