"""Reading values out of a foreign config.json, shared by the dialects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.formats.base import RawConfig, Shapes
from vllm_vispec.utils.errors import ViSpecError

_WRITTEN = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "qkv_bias",
)
_TARGET_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
_PLAIN_ROPE = (None, "default", "mrope")
EMBED_TOKENS = "embed_tokens.weight"


def text_fields(config: RawConfig) -> dict[str, Any]:
    """The text model's fields, whether they lie flat or under `text_config`.

    `model_type` stays that of the whole config: it names the target.
    """
    nested = config.get("text_config")
    merged = dict(config)
    if isinstance(nested, Mapping):
        merged.update({k: v for k, v in nested.items() if k not in ("model_type", "architectures")})
    return merged


def require(config: RawConfig, name: str) -> Any:
    """A field that has no sensible default.

    Raises:
        ViSpecError: it is missing.
    """
    value = config.get(name)
    if value is None:
        raise ViSpecError(
            f"config.json of the head lacks {name!r}: copy it from the config the head was "
            "trained with"
        )
    return value


def require_int(config: RawConfig, name: str) -> int:
    """An integer field of at least 1, needed before the `HeadConfig` can check it."""
    value = require(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ViSpecError(
            f"{name} in the head's config.json is {value!r}, it must be an integer of at least "
            "1: correct the head's config.json"
        )
    return value


def flag(config: RawConfig, name: str, default: bool) -> bool:
    """A true/false field.

    Raises:
        ViSpecError: the value is of another type.
    """
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ViSpecError(f"{name} in the head's config.json is {value!r}: set it to true or false")
    return value


def attention_sizes(config: RawConfig) -> dict[str, int]:
    """hidden_size, intermediate_size, heads and head_dim (absent = hidden_size / heads)."""
    heads = require_int(config, "num_attention_heads")
    hidden = require_int(config, "hidden_size")
    kv_heads = (
        heads
        if config.get("num_key_value_heads") is None
        else require_int(config, "num_key_value_heads")
    )
    head_dim = (
        hidden // heads if config.get("head_dim") is None else require_int(config, "head_dim")
    )
    return {
        "hidden_size": hidden,
        "intermediate_size": require_int(config, "intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


def rope_theta(config: RawConfig, default: float = 10000.0) -> float:
    """RoPE base, from the old flat key or from transformers 5's `rope_parameters`.

    Raises:
        ViSpecError: the head asks for scaled RoPE, which the draft does not do.
    """
    theta = config.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        section = config.get(key)
        if not isinstance(section, Mapping):
            continue
        kind = section.get("rope_type", section.get("type"))
        if kind not in _PLAIN_ROPE:
            raise ViSpecError(
                f"{key} of the head asks for {kind!r} RoPE: only plain RoPE is supported, "
                f"remove {key} from the head's config.json or train a head without it"
            )
        theta = section.get("rope_theta", theta)
    return default if theta is None else theta


def vocab_size(config: RawConfig, shapes: Shapes) -> int:
    """Rows of the head's embedding table, or `vocab_size` of a head without one.

    The table wins: configs copied from a target sometimes miss its padding rows.
    """
    shape = shapes.get(EMBED_TOKENS)
    if shape:
        return shape[0]
    return require_int(config, "vocab_size")


def query_tokens(shapes: Shapes, name: str) -> int:
    """`num_q` out of the shape [num_q, heads, head_dim] of the learned queries.

    Raises:
        ViSpecError: the tensor is missing or not three-dimensional.
    """
    shape = shapes.get(name)
    if shape is None:
        raise ViSpecError(
            f"the head lacks tensor {name!r}, whose shape gives the number of query tokens: "
            "download or export the head again"
        )
    if len(shape) != 3 or shape[0] < 1:
        raise ViSpecError(
            f"tensor {name!r} of the head has shape {list(shape)}, expected "
            "[query tokens, heads, head_dim] with at least one query token: export the head again"
        )
    return shape[0]


def check_activation(config: RawConfig) -> None:
    """The draft's MLP is SiLU-gated; refuse a head trained with anything else."""
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ViSpecError(
            f"hidden_act of the head is {activation!r}: only 'silu' is supported, train the head "
            "with it"
        )


def target_like_config(head: HeadConfig, dtype: str) -> dict[str, Any]:
    """A flat config.json of one layer in the style of the target's, as published heads carry it.

    Args:
        dtype: of the weights, e.g. "bfloat16".
    """
    config: dict[str, Any] = {
        "model_type": head.target_model_type,
        **{name: getattr(head, name) for name in _WRITTEN},
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if head.target_model_type in _TARGET_CLASSES:
        config["architectures"] = [_TARGET_CLASSES[head.target_model_type]]
    if head.head_dim * head.num_attention_heads != head.hidden_size:
        config["head_dim"] = head.head_dim
    return config


def common_fields(config: RawConfig, shapes: Shapes) -> dict[str, Any]:
    """The fields of `HeadConfig` that the published dialects state alike.

    Args:
        config: the text part of config.json, see `text_fields`.
        shapes: the file's tensors.

    Raises:
        ViSpecError: a field is missing, or asks for what the draft does not do.
    """
    check_activation(config)
    return {
        **attention_sizes(config),
        "vocab_size": vocab_size(config, shapes),
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "rope_theta": rope_theta(config),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "has_embed_tokens": EMBED_TOKENS in shapes,
    }
