"""The tensors of a head, by name and shape, without any tensor library.

A compressor's shapes alone come from its modules, which need torch: they are asked only for a head
that has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_vispec.heads.config import HeadConfig

Shape = tuple[int, ...]
COMPRESSOR_PREFIX = "compressor."
PROJECTOR_PREFIX = "projector."


def head_shapes(config: HeadConfig) -> dict[str, Shape]:
    """Canonical name -> shape of every tensor that a head of this configuration consists of."""
    if config.is_draft_vlm:
        return _draft_vlm_shapes(config)
    d = config.hidden_size
    adaptor_bias = {"img_adaptor.k_proj.bias": (d,), "img_adaptor.v_proj.bias": (d,)}
    shapes: dict[str, Shape] = {"fc.weight": (d, 2 * d), **_layer_shapes(config)}
    optional: list[tuple[bool, Mapping[str, Shape]]] = [
        (config.has_embed_tokens, {"embed_tokens.weight": (config.vocab_size, d)}),
        (config.fc_bias, {"fc.bias": (d,)}),
        (config.has_img_fc, {"img_fc.weight": (d, 2 * d)}),
        (config.has_img_fc and config.fc_bias, {"img_fc.bias": (d,)}),
        (config.has_adaptor, _adaptor_shapes(config)),
        (config.has_adaptor and config.qkv_bias, adaptor_bias),
        (config.final_norm, {"norm.weight": (d,)}),
        (config.has_compressor, _compressor_shapes(config)),
    ]
    for wanted, extra in optional:
        if wanted:
            shapes.update(extra)
    return shapes


def _draft_vlm_shapes(config: HeadConfig) -> dict[str, Shape]:
    d, table = config.hidden_size, (config.vocab_size, config.hidden_size)
    shapes: dict[str, Shape] = {
        "embed_tokens.weight": table,
        f"{PROJECTOR_PREFIX}linear_1.weight": (d, config.vision_size),
        f"{PROJECTOR_PREFIX}linear_1.bias": (d,),
        f"{PROJECTOR_PREFIX}linear_2.weight": (d, d),
        f"{PROJECTOR_PREFIX}linear_2.bias": (d,),
    }
    layer = {name.removeprefix("layer."): shape for name, shape in _layer_shapes(config).items()}
    for index in range(config.num_hidden_layers):
        shapes.update({f"layers.{index}.{name}": shape for name, shape in layer.items()})
    shapes["norm.weight"] = (d,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = table
    return shapes


def _adaptor_shapes(config: HeadConfig) -> dict[str, Shape]:
    d, heads = config.hidden_size, config.num_attention_heads
    return {
        "img_adaptor.query": (config.num_query_tokens, heads, config.adaptor_head_dim),
        "img_adaptor.k_proj.weight": (d, d),
        "img_adaptor.v_proj.weight": (d, d),
        "img_adaptor.o_proj.weight": (d, d),
    }


def _compressor_shapes(config: HeadConfig) -> dict[str, Shape]:
    if not config.has_compressor:
        return {}
    from vllm_vispec.compressors.compressor import compressor_shapes

    shapes = compressor_shapes(
        config.compressor_spec, config.hidden_size, config.num_attention_heads, config.qkv_bias
    )
    return {f"{COMPRESSOR_PREFIX}{name}": shape for name, shape in shapes.items()}


def _layer_shapes(config: HeadConfig) -> dict[str, Shape]:
    d, f = config.hidden_size, config.intermediate_size
    q_out = config.num_attention_heads * config.head_dim
    kv_out = config.num_key_value_heads * config.head_dim
    shapes: dict[str, Shape] = {
        "layer.self_attn.q_proj.weight": (q_out, d),
        "layer.self_attn.k_proj.weight": (kv_out, d),
        "layer.self_attn.v_proj.weight": (kv_out, d),
        "layer.self_attn.o_proj.weight": (d, q_out),
        "layer.mlp.gate_proj.weight": (f, d),
        "layer.mlp.up_proj.weight": (f, d),
        "layer.mlp.down_proj.weight": (d, f),
        "layer.post_attention_layernorm.weight": (d,),
    }
    if config.qkv_bias:
        shapes["layer.self_attn.q_proj.bias"] = (q_out,)
        shapes["layer.self_attn.k_proj.bias"] = (kv_out,)
        shapes["layer.self_attn.v_proj.bias"] = (kv_out,)
    if config.layer0_input_norm:
        shapes["layer.input_layernorm.weight"] = (d,)
    return shapes
