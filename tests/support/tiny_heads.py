"""Random ViSpec heads for the tiny targets, in every layout.

Heads without compression or global feature, and those with a compressor of their own, exist in the
canonical layout only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.compressor_heads import random_compressor
from tests.support.tiny_configs import FAMILIES, HEADS, HIDDEN, MAX_POSITIONS, MLP, VOCAB, Family

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class HeadSpec:
    """What distinguishes one random head from another.

    ``noise`` scales everything that disturbs the copied embedding: fused hidden states, the global
    feature and the decoder layer. More noise means fewer accepted tokens; from about 0.8 on the
    chain of steps also amplifies rounding, so that draft logits of two runs differ by over 1e-4.
    A ``compressor`` other than "query" needs ``num_q`` = 1.
    """

    kind: str
    num_q: int = 2
    dialect: str = "reference"
    qkv_bias: bool = True
    noise: float = 0.6
    seed: int = 0
    compress: bool = True
    global_feature: bool = True
    compressor: str = "query"
    kv_heads: int = HEADS

    @property
    def has_compressor(self) -> bool:
        """Whether it is another one than ViSpec's adaptor."""
        return self.compressor != "query"


def build_head(spec: HeadSpec, target: Path, folder: Path) -> Path:
    """Write the head ``spec`` for the tiny ``target`` folder to ``folder`` and return it."""
    from safetensors.torch import load_file, save_file

    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(target / "model.safetensors")
    embedding = next(t for name, t in weights.items() if name.endswith("embed_tokens.weight"))
    tensors = _tensors(spec, embedding)
    rename, config = DIALECTS[spec.dialect]
    named = {rename(name): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    settings = _base_config(spec) | config(spec, FAMILIES[spec.kind])
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def _tensors(spec: HeadSpec, embedding: torch.Tensor) -> Tensors:
    """Return the head's tensors under the reference names (fp32)."""
    import torch

    generator = torch.Generator().manual_seed(spec.seed + 1000)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.empty(shape).normal_(generator=generator) * scale

    unit = HIDDEN**-0.5
    eye = torch.eye(HIDDEN)
    tensors = {
        "embed_tokens.weight": embedding.clone(),
        "fc.weight": torch.cat([eye, normal(HIDDEN, HIDDEN, scale=unit * spec.noise)], dim=1),
        "fc.bias": normal(HIDDEN, scale=0.1),
        "img_fc.weight": torch.cat([eye, normal(HIDDEN, HIDDEN, scale=unit)], dim=1),
        "img_fc.bias": normal(HIDDEN, scale=0.1),
        "imadpt.q": normal(spec.num_q, HEADS, HIDDEN // HEADS, scale=1.0),
        "layers.0.post_attention_layernorm.weight": 1 + normal(HIDDEN, scale=0.1),
        "layers.0.mlp.gate_proj.weight": normal(MLP, HIDDEN, scale=unit),
        "layers.0.mlp.up_proj.weight": normal(MLP, HIDDEN, scale=unit),
        "layers.0.mlp.down_proj.weight": normal(HIDDEN, MLP, scale=MLP**-0.5 * spec.noise),
        "layers.0.self_attn.o_proj.weight": normal(HIDDEN, HIDDEN, scale=unit * spec.noise),
        "imadpt.o_proj.weight": normal(HIDDEN, HIDDEN, scale=unit),
    }
    for owner, names in (("layers.0.self_attn", "qkv"), ("imadpt", "kv")):
        for name in names:
            is_layers_key = owner == "layers.0.self_attn" and name != "q"
            rows = spec.kv_heads * HIDDEN // HEADS if is_layers_key else HIDDEN
            tensors[f"{owner}.{name}_proj.weight"] = normal(rows, HIDDEN, scale=unit)
            if spec.qkv_bias:
                tensors[f"{owner}.{name}_proj.bias"] = normal(rows, scale=0.1)
    for prefix, wanted in (
        ("imadpt.", (spec.compress and not spec.has_compressor) or spec.global_feature),
        ("img_fc.", spec.global_feature),
    ):
        if not wanted:
            tensors = {name: row for name, row in tensors.items() if not name.startswith(prefix)}
    if spec.has_compressor:
        tensors |= random_compressor(spec.compressor, HIDDEN, HEADS, spec.qkv_bias, generator)
    if spec.dialect == "automodel":
        tensors["layers.0.input_layernorm.weight"] = 1 + normal(HIDDEN, scale=0.1)
        tensors["norm.weight"] = 1 + normal(HIDDEN, scale=0.1)
    return tensors


def _base_config(spec: HeadSpec) -> dict[str, Any]:
    family = FAMILIES[spec.kind]
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_attention_heads": HEADS,
        "num_key_value_heads": spec.kv_heads,
        "num_hidden_layers": 1,
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_POSITIONS,
        "hidden_act": "silu",
        "rms_norm_eps": family.rms_norm_eps,
        "rope_theta": family.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


def _reference_config(spec: HeadSpec, family: Family) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [family.model_class],
        "model_type": spec.kind,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    return config | ({"qkv_bias": True} if spec.qkv_bias else {})


def _automodel_config(spec: HeadSpec, family: Family) -> dict[str, Any]:
    return {
        "architectures": ["VispecDraftModel"],
        "model_type": spec.kind,
        "vispec_num_query_tokens": spec.num_q,
        "draft_num_hidden_layers": 1,
        "qkv_bias": spec.qkv_bias,
        "fc_bias": True,
        "head_dim": HIDDEN // HEADS,
    }


def _automodel_name(name: str) -> str:
    if name == "imadpt.q":
        return "img_adaptor.query"
    return name.replace("imadpt.", "img_adaptor.")


def _canonical_config(spec: HeadSpec, family: Family) -> dict[str, Any]:
    from vllm_vispec.heads.config import HeadConfig

    head = HeadConfig(
        target_model_type=spec.kind,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_attention_heads=HEADS,
        num_key_value_heads=spec.kv_heads,
        head_dim=HIDDEN // HEADS,
        vocab_size=VOCAB,
        max_position_embeddings=MAX_POSITIONS,
        rope_theta=family.rope_theta,
        rms_norm_eps=family.rms_norm_eps,
        num_query_tokens=spec.num_q,
        qkv_bias=spec.qkv_bias,
        fc_bias=True,
        layer0_input_norm=False,
        final_norm=False,
        global_feature=spec.global_feature,
        compress=spec.compress,
        compressor=spec.compressor,
    )
    return head.to_config_json("float32")


def _canonical_name(name: str) -> str:
    from vllm_vispec.heads.formats import get_format

    if name.startswith("compressor."):
        return name
    found = get_format("reference").canonical_name(name)
    assert found is not None, name
    return found


Rename = Callable[[str], str]
ConfigWriter = Callable[[HeadSpec, Family], dict[str, Any]]

DIALECTS: Mapping[str, tuple[Rename, ConfigWriter]] = {
    "reference": (str, _reference_config),
    "automodel": (_automodel_name, _automodel_config),
    "canonical": (_canonical_name, _canonical_config),
}
