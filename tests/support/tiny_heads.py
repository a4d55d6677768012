"""Random heads and draft VLMs for the tiny targets, whose drafts are accepted now and then.

``noise`` scales everything that disturbs the copied embedding: fused hidden states, the global
feature and the decoder layers. More noise means fewer accepted tokens; from about 0.8 on the chain
of steps also amplifies rounding, so that draft logits of two runs differ by over 1e-4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.tiny_configs import (
    FAMILIES,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    MAX_POSITIONS,
    MLP,
    VOCAB,
)

if TYPE_CHECKING:
    import torch

    from vllm_vispec.heads.config import HeadConfig

# The gate's weights, in units of a normal start: large enough that prompts differ in what it says.
GATE_SCALE = 3.0
# Of the layers, whose outputs are added to the copied embedding.
OUTPUTS = (".o_proj.weight", ".down_proj.weight")


@dataclass(frozen=True)
class HeadSpec:
    """What distinguishes one random head from another.

    Heads without compression or global feature, and those with a ``compressor`` other than "query",
    which need ``num_q`` = 1, exist in the canonical format only.
    """

    kind: str
    num_q: int = 2
    checkpoint_format: str = "reference"
    qkv_bias: bool = True
    noise: float = 0.6
    seed: int = 0
    compress: bool = True
    global_feature: bool = True
    compressor: str = "query"
    kv_heads: int = HEADS


@dataclass(frozen=True)
class DraftVlmSpec:
    """What distinguishes one random draft VLM from another; it is narrower than its target."""

    kind: str
    hidden: int = 48
    layers: int = 2
    heads: int = 2
    kv_heads: int = 1
    qkv_bias: bool = True
    tied: bool = False
    noise: float = 0.6
    seed: int = 0


def build_head(spec: HeadSpec, target: Path, folder: Path) -> Path:
    """Write the head ``spec`` for the tiny ``target`` folder to ``folder`` and return it."""
    has_norms = spec.checkpoint_format == "automodel"
    config = _config(
        spec.kind,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_attention_heads=HEADS,
        num_key_value_heads=spec.kv_heads,
        num_query_tokens=spec.num_q,
        qkv_bias=spec.qkv_bias,
        fc_bias=True,
        layer0_input_norm=has_norms,
        final_norm=has_norms,
        global_feature=spec.global_feature,
        compress=spec.compress,
        compressor=spec.compressor,
    )
    return _write(config, spec.checkpoint_format, spec.noise, spec.seed + 1000, target, folder)


def build_draft_vlm(spec: DraftVlmSpec, target: Path, folder: Path) -> Path:
    """Write the draft VLM ``spec`` for the tiny ``target`` folder to ``folder`` and return it."""
    config = _config(
        spec.kind,
        hidden_size=spec.hidden,
        intermediate_size=2 * spec.hidden,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        num_query_tokens=1,
        qkv_bias=spec.qkv_bias,
        fc_bias=False,
        layer0_input_norm=True,
        final_norm=True,
        global_feature=False,
        compress=False,
        num_hidden_layers=spec.layers,
        vision_size=HIDDEN,
        tie_word_embeddings=spec.tied,
    )
    return _write(config, "canonical", spec.noise, spec.seed + 2000, target, folder)


def _config(kind: str, **settings: Any) -> HeadConfig:
    from vllm_vispec.heads.config import HeadConfig

    return HeadConfig(
        target_model_type=kind,
        head_dim=HEAD_DIM,
        vocab_size=VOCAB,
        max_position_embeddings=MAX_POSITIONS,
        rope_theta=FAMILIES[kind].rope_theta,
        rms_norm_eps=FAMILIES[kind].rms_norm_eps,
        **settings,
    )


def _write(
    config: HeadConfig, checkpoint_format: str, noise: float, seed: int, target: Path, folder: Path
) -> Path:
    """Write random tensors around what is the target's.

    A draft VLM sees the target's embedding and lm_head through one random map to fewer dimensions:
    rows stay nearly orthogonal, so that each token still votes for the same successor.
    """
    import torch
    from safetensors.torch import load_file

    from tests.support.heads import write_tensors
    from vllm_vispec.reference import tensor_shapes

    if (folder / "model.safetensors").exists():
        return folder
    generator = torch.Generator().manual_seed(seed)
    tables = load_file(target / "model.safetensors")
    narrowing = torch.randn(HIDDEN, config.hidden_size, generator=generator) * HIDDEN**-0.5
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        if name in ("embed_tokens.weight", "lm_head.weight"):
            table = next(tensor for key, tensor in tables.items() if key.endswith(name))
            tensors[name] = table @ narrowing if config.is_draft_vlm else table
        else:
            tensors[name] = _random_tensor(name, shape, noise, generator)
    write_tensors(folder, checkpoint_format, config, tensors)
    return folder


def _random_tensor(
    name: str, shape: tuple[int, ...], noise: float, generator: torch.Generator
) -> torch.Tensor:
    import torch

    random = torch.randn(shape, generator=generator)
    if name.startswith("compressor."):
        return random * shape[-1] ** -0.5 * (GATE_SCALE if ".gate." in name else 1)
    if name.endswith("query"):
        return random
    if name.endswith("norm.weight"):
        return 1 + 0.1 * random
    if name.endswith("bias"):
        return 0.1 * random
    if name in ("fc.weight", "img_fc.weight"):
        scale = shape[0] ** -0.5 * (noise if name == "fc.weight" else 1)
        return torch.cat([torch.eye(shape[0]), random[:, shape[0] :] * scale], dim=1)
    is_output = name.startswith("layer") and name.endswith(OUTPUTS)
    return random * shape[1] ** -0.5 * (noise if is_output else 1)


def with_compressor(draft: Path, folder: Path, text: str) -> Path:
    """Write the ViSpec head ``draft`` with the random compressor ``text`` in place of its adaptor.

    The adaptor's last query stays, for the global feature. Returns ``folder``.
    """
    import torch

    from tests.support.heads import write_tensors
    from vllm_vispec.heads.folder import inspect_head, iter_canonical_tensors
    from vllm_vispec.reference import tensor_shapes

    old = inspect_head(draft).config
    head = replace(old, compressor=text, num_query_tokens=1)
    tensors = dict(iter_canonical_tensors(draft))
    tensors["img_adaptor.query"] = tensors["img_adaptor.query"][-1:].clone()
    generator = torch.Generator().manual_seed(0)
    tensors |= {
        name: _random_tensor(name, shape, 1.0, generator)
        for name, shape in tensor_shapes(head).items()
        if name.startswith("compressor.")
    }
    write_tensors(folder, "canonical", head, tensors)
    return folder
