"""Kinds of heads to train: ViSpec and the baselines of its ablation, and how they start.

Tensor names end in their shape: V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_vispec.compressors.spec import QUERY, parse_compressor
from vllm_vispec.heads.config import FIELD_NAMES, HeadConfig
from vllm_vispec.reference import Draft, ViSpecDraft
from vllm_vispec.train.fresh import new_draft_vlm, start_linears
from vllm_vispec.utils.errors import ViSpecError

# Decoder layers of a draft VLM.
DRAFT_VLM_LAYERS = 4
# What disturbs the sum of embedding and state in a fresh `fc`, as a share of a linear's weights.
FUSION_NOISE = 0.3


@dataclass(frozen=True)
class HeadKind:
    """What a kind of head sees of an image, and what it is trained on.

    Attributes:
        compress, global_feature: flags of `HeadConfig`.
        text_only: trained on samples without images only.
        summary: one line for help texts and model cards.
        compressor: what makes an image's tokens unless `head.compressor` says otherwise.
        input_norm: whether the decoder layer norms its input unless `head.input_norm` says so.
        draft_vlm: a vision language model of its own, see `train.draft_vlm`.
    """

    compress: bool
    global_feature: bool
    summary: str
    text_only: bool = False
    compressor: str = QUERY
    input_norm: bool = False
    draft_vlm: bool = False


HEAD_KINDS: Mapping[str, HeadKind] = {
    "vispec": HeadKind(True, True, "compressed images and their global feature"),
    "vispec_no_global": HeadKind(True, False, "compressed images, no global feature"),
    "vispec_no_compress": HeadKind(False, True, "every image token and the global feature"),
    "eagle_vlm": HeadKind(False, False, "EAGLE that sees every image token"),
    "eagle_text": HeadKind(False, False, "EAGLE trained on text only", text_only=True),
    # SpecVLM (arXiv 2509.11815): elastic compressor, norm on the draft's input.
    "specvlm": HeadKind(
        True, False, "SpecVLM: elastic compressor", compressor="select", input_norm=True
    ),
    "specvlm_global": HeadKind(
        True,
        True,
        "SpecVLM's compressor and ViSpec's global feature",
        compressor="select",
        input_norm=True,
    ),
    # Spec-LLaVA (arXiv 2509.11961) and MASSV (arXiv 2505.10526): an independent small model.
    "draft_vlm": HeadKind(
        False,
        False,
        "a small vision language model of its own",
        input_norm=True,
        draft_vlm=True,
    ),
}


def get_kind(name: str) -> HeadKind:
    """The kind `name`.

    Raises:
        ViSpecError: there is none of this name.
    """
    if name not in HEAD_KINDS:
        raise ViSpecError(f"head kind {name!r} is unknown: use one of {', '.join(HEAD_KINDS)}")
    return HEAD_KINDS[name]


def compressor_of(kind: str, text: str) -> str:
    """What a head of this kind compresses images with, in full; "query" is ViSpec's adaptor.

    Args:
        text: as `head.compressor`; "" = the kind's own.

    Raises:
        ViSpecError: unknown kind or compressor, or a kind that does not compress.
    """
    chosen = get_kind(kind)
    if text and not chosen.compress:
        able = [name for name, one in HEAD_KINDS.items() if one.compress]
        raise ViSpecError(
            f"head.compressor {text!r} does not go with head.kind {kind!r}, which sees no "
            f"compressed images: drop it or use one of {', '.join(able)}"
        )
    return str(parse_compressor(text or chosen.compressor))


def new_head_config(
    kind: str,
    target_text_config: Any,
    *,
    target_model_type: str = "",
    num_query_tokens: int = 2,
    compressor: str = "",
    **changes: Any,
) -> HeadConfig:
    """Shape of a fresh head for a target.

    Widths, heads, RoPE base and norm epsilon are those of the target's text model; as in the
    reference, attention is full multi-head (as many key/value as query heads), q/k/v and fc have
    biases, there is no final norm and an input norm only in SpecVLM's kinds. The target's embedding
    table is used. A draft VLM has 4 layers, both norms and tables of its own.

    Args:
        target_text_config: the transformers config of the target's text model.
        target_model_type: `model_type` of the whole target, e.g. "qwen2_5_vl".
        num_query_tokens: 2 in the reference: one row per image and the global feature. With another
            compressor than ViSpec's adaptor there is one, the global feature's.
        compressor: see `compressor_of`.
        changes: other fields of `HeadConfig`, over these defaults.

    Raises:
        ViSpecError: unknown kind or field, or an impossible value.
    """
    chosen = get_kind(kind)
    for name in changes:
        if name not in FIELD_NAMES:
            raise ViSpecError(f"head setting {name!r} is unknown: use fields of HeadConfig")
    flags = {"compress": chosen.compress, "global_feature": chosen.global_feature}
    for name, value in flags.items():
        if changes.get(name, value) != value:
            raise ViSpecError(f"{name}={changes[name]} is no head of kind {kind!r}: drop {name}")
    made_by = compressor_of(kind, compressor)
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


@torch.no_grad()
def new_draft(config: HeadConfig, embed_VD: Tensor, seed: int) -> Draft:
    """A fresh float32 draft on the CPU; the same seed gives the same weights.

    It starts as a plain sum: fc = [I | I] plus a little noise, so that a text row is its token's
    embedding plus its state; img_fc = [I | 0] as in the reference, so that images come in as
    training finds them useful; a compressor starts as it says itself; all other weights are normal,
    biases zero, norms one. For a draft VLM see `fresh.new_draft_vlm`.

    Args:
        embed_VD: the target's embedding table, copied and frozen if the head has its own.

    Raises:
        ViSpecError: the table does not fit the head.
    """
    wanted = (config.vocab_size, config.vision_size or config.hidden_size)
    if tuple(embed_VD.shape) != wanted:
        raise ViSpecError(
            f"the target's embedding table is {tuple(embed_VD.shape)}, the head's config says "
            f"{wanted}: set vocab_size and hidden_size of the head to the target's"
        )
    if config.is_draft_vlm:
        return new_draft_vlm(config, embed_VD, seed)
    draft = ViSpecDraft(config)
    generator = torch.Generator().manual_seed(seed)
    start_linears(draft, generator)
    _start_fusion(draft)
    if draft.img_adaptor is not None:
        std = config.adaptor_head_dim**-0.5
        nn.init.normal_(draft.img_adaptor.query, std=std, generator=generator)
    if draft.compressor is not None:
        draft.compressor.start(generator)
    if draft.embed_tokens is not None:
        draft.embed_tokens.weight.copy_(embed_VD)
        draft.embed_tokens.weight.requires_grad_(False)
    return draft


def _start_fusion(draft: ViSpecDraft) -> None:
    eye_DD = torch.eye(draft.config.hidden_size)
    draft.fc.weight.mul_(FUSION_NOISE).add_(torch.cat((eye_DD, eye_DD), dim=1))
    if draft.img_fc is not None:
        draft.img_fc.weight.copy_(torch.cat((eye_DD, torch.zeros_like(eye_DD)), dim=1))
