"""Checks of a head's configuration; all raise `ViSpecError`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_vispec.compressors.spec import QUERY
from vllm_vispec.utils.errors import ViSpecError

if TYPE_CHECKING:
    from vllm_vispec.heads.config import HeadConfig

_POSITIVE = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "num_query_tokens",
    "num_hidden_layers",
)
_FLAGS = (
    "qkv_bias",
    "fc_bias",
    "layer0_input_norm",
    "final_norm",
    "global_feature",
    "compress",
    "has_embed_tokens",
    "tie_word_embeddings",
)
# What a draft VLM is by its nature.
_DRAFT_VLM = {
    "compress": False,
    "global_feature": False,
    "num_query_tokens": 1,
    "compressor": QUERY,
    "fc_bias": False,
    "layer0_input_norm": True,
    "final_norm": True,
    "has_embed_tokens": True,
}
# What only a draft VLM may have.
_OTHERS = {"num_hidden_layers": 1, "tie_word_embeddings": False}


def check_head(config: HeadConfig) -> None:
    """Refuse values that are impossible, alone or together."""
    for name in _POSITIVE:
        require_positive_int(name, getattr(config, name))
    for name in ("rope_theta", "rms_norm_eps"):
        require_positive_number(name, getattr(config, name))
    for name in _FLAGS:
        require_flag(name, getattr(config, name))
    if config.num_attention_heads % config.num_key_value_heads:
        raise ViSpecError(
            f"num_key_value_heads={config.num_key_value_heads} of the head does not divide "
            f"num_attention_heads={config.num_attention_heads}: correct the head's config.json"
        )
    _check_compressor(config)
    if (config.has_adaptor or config.has_compressor) and (
        config.hidden_size % config.num_attention_heads
    ):
        raise ViSpecError(
            f"num_attention_heads={config.num_attention_heads} of the head does not divide "
            f"hidden_size={config.hidden_size}, which the image adaptor needs: correct the "
            "head's config.json"
        )
    if config.head_dim % 2:
        raise ViSpecError(
            f"head_dim={config.head_dim} of the head is odd, RoPE needs an even one: correct "
            "the head's config.json"
        )
    _check_draft_vlm(config)


def _check_compressor(config: HeadConfig) -> None:
    if not isinstance(config.compressor, str):
        raise ViSpecError(
            f"compressor of the head is {config.compressor!r}, it must be a text like "
            '"prune:20": correct the head\'s config.json'
        )
    if config.compressor_spec.is_query:
        return
    if not config.compress:
        raise ViSpecError(
            f"compressor {config.compressor!r} of the head needs compress = true: set it, or "
            "drop the compressor"
        )
    if config.num_query_tokens != 1:
        raise ViSpecError(
            f"num_query_tokens={config.num_query_tokens} does not go with the compressor "
            f"{config.compressor!r} of the head: set it to 1, the global feature's query"
        )


def _check_draft_vlm(config: HeadConfig) -> None:
    size = config.vision_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ViSpecError(
            f"vision_size of the head is {size!r}, it must be an integer of at least 0 (0: a head "
            "on the target's states): correct the head's config.json"
        )
    for name, value in (_DRAFT_VLM if config.is_draft_vlm else _OTHERS).items():
        if getattr(config, name) == value:
            continue
        what = f"a draft VLM (vision_size={size})" if size else "a head without vision_size"
        raise ViSpecError(
            f"{name} of the head is {getattr(config, name)!r}, in {what} it must be {value!r}: "
            "correct the head's config.json"
        )


def check_version(section: Mapping[str, Any], newest: int) -> None:
    """Refuse a "vispec" section of a later release than this one."""
    version = section.get("format_version", newest)
    if not isinstance(version, int) or not 1 <= version <= newest:
        raise ViSpecError(
            f"the head's vispec.format_version is {version!r}, this release reads up to "
            f"{newest}: upgrade vllm-vispec"
        )


def rope_theta_of(content: Mapping[str, Any]) -> Any:
    """RoPE's base, in the way of transformers 5 or of earlier ones."""
    parameters = content.get("rope_parameters")
    if isinstance(parameters, Mapping) and "rope_theta" in parameters:
        return parameters["rope_theta"]
    if "rope_theta" in content:
        return content["rope_theta"]
    raise ViSpecError(
        "config.json of the head lacks 'rope_theta': restore the config.json that was written "
        "with these weights"
    )


def require_flag(name: str, value: object) -> None:
    """Refuse what is neither true nor false."""
    if not isinstance(value, bool):
        raise ViSpecError(
            f"{name} of the head is {value!r}, it must be true or false: correct the head's "
            "config.json"
        )


def require_positive_int(name: str, value: object) -> None:
    """Refuse what is no integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ViSpecError(
            f"{name} of the head is {value!r}, it must be an integer of at least 1: correct the "
            "head's config.json or its weights"
        )


def require_positive_number(name: str, value: object) -> None:
    """Refuse what is no number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ViSpecError(
            f"{name} of the head is {value!r}, it must be a positive number: correct the head's "
            "config.json"
        )
