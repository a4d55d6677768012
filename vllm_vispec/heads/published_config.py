"""Reading and writing the config.json of published heads, which resembles the target's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_vispec.heads.config import LLAMA_FIELDS, HeadConfig
from vllm_vispec.utils.errors import ViSpecError

Shapes = Mapping[str, tuple[int, ...]]
RawConfig = Mapping[str, Any]

_TARGET_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
_PLAIN_ROPE = (None, "default", "mrope")
_EMBED_TOKENS = "embed_tokens.weight"


def text_fields(config: RawConfig) -> dict[str, Any]:
    """Return the text model's fields, whether they are flat or under `text_config`.

    `model_type` stays that of the whole config: it names the target.
    """
    nested = config.get("text_config")
    merged = dict(config)
    if isinstance(nested, Mapping):
        merged |= {k: v for k, v in nested.items() if k not in ("model_type", "architectures")}
    return merged


def flag(config: RawConfig, name: str, default: bool) -> bool:
    """Return a true/false field.

    Raises:
        ViSpecError: the value is of another type.
    """
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ViSpecError(f"{name} in the head's config.json is {value!r}: set it to true or false")
    return value


def query_tokens(shapes: Shapes, name: str) -> int:
    """Return the number of queries: the first of the sizes [queries, heads, head_dim] of a tensor.

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


def common_fields(config: RawConfig, shapes: Shapes) -> dict[str, Any]:
    """Return the fields of `HeadConfig` that all published formats state alike.

    Args:
        config: see `text_fields`.
        shapes: the tensors.

    Raises:
        ViSpecError: a field is missing, or asks for what the draft does not do.
    """
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ViSpecError(
            f"hidden_act of the head is {activation!r}: only 'silu' is supported, train the head "
            "with it"
        )
    heads = _integer(config, "num_attention_heads")
    hidden = _integer(config, "hidden_size")
    # Configs copied from a target sometimes miss the padding rows of its embedding table.
    table = shapes.get(_EMBED_TOKENS)
    return {
        "hidden_size": hidden,
        "intermediate_size": _integer(config, "intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": _integer(config, "num_key_value_heads", heads),
        "head_dim": _integer(config, "head_dim", hidden // heads),
        "vocab_size": table[0] if table else _integer(config, "vocab_size"),
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "rope_theta": _rope_theta(config),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "has_embed_tokens": table is not None,
    }


def target_like_config(head: HeadConfig, dtype: str) -> dict[str, Any]:
    """Return a flat config.json of one layer in the style of the target's.

    Args:
        dtype: of the weights, e.g. "bfloat16".
    """
    config: dict[str, Any] = {
        "model_type": head.target_model_type,
        **{name: getattr(head, name) for name in (*LLAMA_FIELDS, "rope_theta", "qkv_bias")},
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if head.target_model_type in _TARGET_CLASSES:
        config["architectures"] = [_TARGET_CLASSES[head.target_model_type]]
    if head.head_dim * head.num_attention_heads == head.hidden_size:
        del config["head_dim"]
    return config


def _integer(config: RawConfig, name: str, default: int | None = None) -> int:
    """Return an integer of at least 1; needed before `HeadConfig` can check it."""
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise ViSpecError(
            f"config.json of the head lacks {name!r}: copy it from the config the head was "
            "trained with"
        )
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ViSpecError(
            f"{name} in the head's config.json is {value!r}, it must be an integer of at least "
            "1: correct the head's config.json"
        )
    return value


def _rope_theta(config: RawConfig) -> float:
    """Return RoPE's base: in the flat key, or in transformers 5's `rope_parameters`."""
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
    return 10000.0 if theta is None else theta
