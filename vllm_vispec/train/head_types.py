"""Head types to train: ViSpec and the baselines of its ablation; what a recipe means for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_vispec.compressors.spec import QUERY, parse_compressor
from vllm_vispec.heads.config import FIELD_NAMES, HeadConfig
from vllm_vispec.train.config import HeadSettings, TrainConfig
from vllm_vispec.train.losses import STATE_TERMS, get_loss
from vllm_vispec.utils.errors import ViSpecError

# Decoder layers of a draft VLM.
DRAFT_VLM_LAYERS = 4
# The loss of a head: SpecVLM distils with a compressor, ViSpec with its adaptor and without any;
# a draft VLM has no states that could be compared.
COMPRESSOR_LOSS, OTHER_LOSS, DRAFT_VLM_LOSS = "specvlm", "vispec", "kl"
# Settings that mean something for draft VLMs only.
_DRAFT_VLM_ONLY = ("num_layers", "hidden_size", "num_heads", "trained")


@dataclass(frozen=True)
class HeadType:
    """What a head of this type sees of an image, and what it is trained on.

    Attributes:
        compress, global_feature: flags of `HeadConfig`.
        text_only: trained on samples without images only.
        summary: one line for help texts and model cards.
        compressor: what makes an image's tokens unless `head.compressor` says otherwise.
        input_norm: whether the decoder layer norms its input unless `head.input_norm` says so.
        draft_vlm: an independent small vision language model.
    """

    compress: bool
    global_feature: bool
    summary: str
    text_only: bool = False
    compressor: str = QUERY
    input_norm: bool = False
    draft_vlm: bool = False


HEAD_TYPES: Mapping[str, HeadType] = {
    "vispec": HeadType(True, True, "compressed images and their global feature"),
    "vispec_no_global": HeadType(True, False, "compressed images, no global feature"),
    "vispec_no_compress": HeadType(False, True, "every image token and the global feature"),
    "eagle_vlm": HeadType(False, False, "EAGLE that sees every image token"),
    "eagle_text": HeadType(False, False, "EAGLE trained on text only", text_only=True),
    # SpecVLM (arXiv 2509.11815): elastic compressor, norm on the draft's input.
    "specvlm": HeadType(
        True, False, "SpecVLM: elastic compressor", compressor="select", input_norm=True
    ),
    "specvlm_global": HeadType(
        True,
        True,
        "SpecVLM's compressor and ViSpec's global feature",
        compressor="select",
        input_norm=True,
    ),
    # Spec-LLaVA (arXiv 2509.11961) and MASSV (arXiv 2505.10526): an independent small model.
    "draft_vlm": HeadType(
        False,
        False,
        "a small vision language model of its own",
        input_norm=True,
        draft_vlm=True,
    ),
}


def get_head_type(name: str) -> HeadType:
    """Return the head type of this name (`head.kind` in a recipe).

    Raises:
        ViSpecError: there is none.
    """
    if name not in HEAD_TYPES:
        raise ViSpecError(f"head type {name!r} is unknown: use one of {', '.join(HEAD_TYPES)}")
    return HEAD_TYPES[name]


def compressor_of(head_type: str, text: str) -> str:
    """Return the whole specification of a head's compressor; "query" is ViSpec's adaptor.

    Args:
        text: as `head.compressor`; "" = the one of the head type.

    Raises:
        ViSpecError: unknown head type or compressor, or a head type that does not compress.
    """
    chosen = get_head_type(head_type)
    if text and not chosen.compress:
        able = [name for name, one in HEAD_TYPES.items() if one.compress]
        raise ViSpecError(
            f"head.compressor {text!r} does not go with head.kind {head_type!r}, which sees no "
            f"compressed images: drop it or use one of {', '.join(able)}"
        )
    return str(parse_compressor(text or chosen.compressor))


def new_head_config(
    head_type: str,
    target_text_config: Any,
    *,
    target_model_type: str = "",
    num_query_tokens: int = 2,
    compressor: str = "",
    **changes: Any,
) -> HeadConfig:
    """Return the configuration of a new head for a target, in our own checkpoint format.

    Widths, heads, RoPE base and norm epsilon are those of the target's text model; as in the
    reference, attention is full multi-head (as many key/value as query heads), q/k/v and fc have
    biases, there is no final norm and an input norm only in SpecVLM's heads. The target's embedding
    table is used. A draft VLM has 4 layers, both norms and its own tables.

    Args:
        target_text_config: the transformers config of the target's text model.
        target_model_type: `model_type` of the whole target, e.g. "qwen2_5_vl".
        num_query_tokens: 2 in the reference: one row per image and the global feature. With another
            compressor than ViSpec's adaptor there is one, the global feature's.
        compressor: see `compressor_of`.
        changes: other fields of `HeadConfig`, over these defaults.

    Raises:
        ViSpecError: unknown head type or field, or an impossible value.
    """
    chosen = get_head_type(head_type)
    for name in changes:
        if name not in FIELD_NAMES:
            raise ViSpecError(f"head setting {name!r} is unknown: use fields of HeadConfig")
    flags = {"compress": chosen.compress, "global_feature": chosen.global_feature}
    for name, value in flags.items():
        if changes.get(name, value) != value:
            raise ViSpecError(
                f"{name}={changes[name]} is no head of type {head_type!r}: drop {name}"
            )
    made_by = compressor_of(head_type, compressor)
    fields: dict[str, Any] = {
        **_sizes_of(target_text_config),
        "target_model_type": target_model_type,
        "num_query_tokens": num_query_tokens if made_by == QUERY else 1,
        "compressor": made_by,
        "qkv_bias": True,
        "fc_bias": True,
        "layer0_input_norm": chosen.input_norm,
        "final_norm": False,
        "has_embed_tokens": False,
        **flags,
        **(_draft_vlm_fields(target_text_config) if chosen.draft_vlm else {}),
    }
    return HeadConfig(**(fields | changes))


def _draft_vlm_fields(text: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": DRAFT_VLM_LAYERS,
        "vision_size": text.hidden_size,
        "num_query_tokens": 1,
        "fc_bias": False,
        "final_norm": True,
        "has_embed_tokens": True,
    }


def _sizes_of(text: Any) -> dict[str, Any]:
    heads = text.num_attention_heads
    return {
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_position_embeddings,
        "rope_theta": _rope_theta(text),
        "rms_norm_eps": text.rms_norm_eps,
    }


def _rope_theta(text: Any) -> float:
    """transformers 5 keeps the base in `rope_parameters`, older versions in `rope_theta`."""
    parameters = getattr(text, "rope_parameters", None) or {}
    theta = parameters.get("rope_theta") or getattr(text, "rope_theta", None)
    if theta is None:
        raise ViSpecError(
            "the target's text config states no rope_theta: set rope_theta of the head yourself"
        )
    return float(theta)


def resolve(config: TrainConfig) -> TrainConfig:
    """Return the recipe with the loss its head trains on; checks head type and compressor.

    Raises:
        ViSpecError: head type or compressor is unknown, or settings do not go together.
    """
    made_by = compressor_of(config.head.kind, config.head.compressor)
    is_vlm = get_head_type(config.head.kind).draft_vlm
    if config.loss.name == "auto":
        name = OTHER_LOSS if made_by == QUERY else COMPRESSOR_LOSS
        name = DRAFT_VLM_LOSS if is_vlm else name
        loss = config.loss.model_copy(update={"name": name})
        config = config.model_copy(update={"loss": loss})
    (_check_draft_vlm if is_vlm else _check_head)(config)
    return config


def _check_draft_vlm(config: TrainConfig) -> None:
    loss = config.loss
    terms = STATE_TERMS & set(get_loss(loss.name, **loss.weights).weights)
    if terms:
        raise ViSpecError(
            f"loss {loss.name!r} compares hidden states ({', '.join(sorted(terms))}), a draft VLM "
            f"has none of the target's: use loss.name {DRAFT_VLM_LOSS} or set these "
            "loss.weights to 0"
        )
    if loss.noise:
        raise ViSpecError(
            f"loss.noise {loss.noise} disturbs the target's states, a draft VLM reads none: set "
            "it to 0"
        )
    if config.head.input_norm == "off":
        raise ViSpecError("head.input_norm off does not go with a draft VLM: leave it at auto")
    if config.head.trained == "projector" and not config.head.init_from:
        raise ViSpecError(
            "head.trained projector would freeze a new draft VLM's random weights: set "
            "head.init_from to a language model's folder, or train all"
        )


def _check_head(config: TrainConfig) -> None:
    defaults = HeadSettings()
    for name in _DRAFT_VLM_ONLY:
        if getattr(config.head, name) != getattr(defaults, name):
            able = [head_type for head_type, one in HEAD_TYPES.items() if one.draft_vlm]
            raise ViSpecError(
                f"head.{name} is {getattr(config.head, name)!r}, which head.kind "
                f"{config.head.kind!r} does not have: drop it, or use {', '.join(able)}"
            )
