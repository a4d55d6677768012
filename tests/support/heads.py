"""Small random heads and draft VLMs, in every format, written as their authors write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.tiny_families import DRAFT_VLM_KIND
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.formats import get_format
from vllm_vispec.reference import DraftVlm, tensor_shapes

Config = dict[str, Any]
Tensors = dict[str, Tensor]

BASE = HeadConfig(
    target_model_type="qwen2_5_vl",
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    vocab_size=64,
    max_position_embeddings=128,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    num_query_tokens=3,
    qkv_bias=True,
    fc_bias=True,
    layer0_input_norm=False,
    final_norm=False,
)

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def _sizes(head: HeadConfig) -> Config:
    return {name: getattr(head, name) for name in _SIZES}


def _reference_config(head: HeadConfig) -> Config:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": head.target_model_type,
        **_sizes(head),
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rope_theta": head.rope_theta,
        "qkv_bias": head.qkv_bias,
        "bias": head.fc_bias,
    }


def _automodel_config(head: HeadConfig) -> Config:
    return {
        "architectures": ["VispecDraftModel"],
        "model_type": f"{head.target_model_type}_text",
        **_sizes(head),
        "head_dim": head.head_dim,
        "draft_num_hidden_layers": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": head.rope_theta,
            "mrope_section": [1, 1, 2],
        },
        "vispec_num_query_tokens": head.num_query_tokens,
        "qkv_bias": head.qkv_bias,
        "fc_bias": head.fc_bias,
    }


_CONFIGS: dict[str, Callable[[HeadConfig], Config]] = {
    "reference": _reference_config,
    "eagle": _reference_config,
    "msd": _reference_config,
    "automodel": _automodel_config,
    "canonical": lambda head: head.to_config_json("float32"),
}

# What is typical of each checkpoint format; a test may change it.
TYPICAL = {
    "reference": BASE,
    "automodel": replace(BASE, layer0_input_norm=True, final_norm=True),
    "canonical": replace(BASE, num_key_value_heads=2, fc_bias=False, final_norm=True),
}


def random_tensors(head: HeadConfig) -> Tensors:
    """Return canonical tensors of a head."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * 0.2
        for name, shape in tensor_shapes(head).items()
    }


def write_head(folder: Path, checkpoint_format: str = "reference", **changes: Any) -> HeadConfig:
    """Write a random head; ``changes`` go to its ``HeadConfig``. Returns that."""
    head = replace(TYPICAL[checkpoint_format], **changes)
    write_tensors(folder, checkpoint_format, head, random_tensors(head))
    return head


def write_tensors(folder: Path, checkpoint_format: str, head: HeadConfig, tensors: Tensors) -> None:
    """Write a head with canonical tensors in this format."""
    names = get_format(checkpoint_format)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, _CONFIGS[checkpoint_format](head))
    save_file(
        {names.source_name(name): tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def write_config(folder: Path, config: Config) -> None:
    """Replace config.json."""
    (folder / "config.json").write_text(json.dumps(config))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    write_config(folder, {key: value for key, value in config.items() if value is not None})


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change model.safetensors in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# Narrower than the target's image embeddings, and with fewer key heads than query heads.
_DRAFT_VLM = DRAFT_VLM_KIND | {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "vision_size": 32,
}
DRAFT_VLM = replace(BASE, **_DRAFT_VLM)


def write_draft_vlm(folder: Path, **changes: Any) -> HeadConfig:
    """Write a random draft VLM; ``changes`` go to its ``HeadConfig``. Returns that."""
    return write_head(folder, "canonical", **(_DRAFT_VLM | changes))


def random_draft_vlm(config: HeadConfig = DRAFT_VLM) -> DraftVlm:
    """Return one whose weights are all random, biases and norms included."""
    draft = DraftVlm(config)
    draft.load_state_dict(random_tensors(config))
    return draft.eval()


def random_prompt(length: int, width: int = 32, vocab: int = 64) -> tuple[Tensor, ...]:
    """Return token ids [L] and the target's input embeddings [L, width]."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(vocab, (length,), generator=generator)
    return ids, torch.randn(length, width, generator=generator)
