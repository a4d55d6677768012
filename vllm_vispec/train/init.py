"""The draft that a run starts from: new, or made from another head or a language model.

Tensor names end in their shape: V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.folder import load_draft
from vllm_vispec.heads.target import check_against_target
from vllm_vispec.reference import Draft, DraftVlm, ViSpecDraft
from vllm_vispec.reference.modeling_draft_vlm import PROJECTOR_PREFIX
from vllm_vispec.train.config import HeadSettings
from vllm_vispec.train.head_types import get_head_type, new_head_config
from vllm_vispec.train.language_model import is_language_model, read_language_model
from vllm_vispec.train.target import TargetFacts
from vllm_vispec.utils.errors import ViSpecError

# Times in_features ** -0.5; the usual 0.02 at a width of about 1200.
WEIGHT_SCALE = 0.7
# What disturbs the sum of embedding and state in a new `fc`, as a share of a linear's weights.
FUSION_NOISE = 0.3
# Widths of MLPs are multiples of this.
_MLP_MULTIPLE = 8
# What a head keeps of the one it starts from; its type decides about images.
_KEPT = (
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_theta",
    "rms_norm_eps",
    "qkv_bias",
    "fc_bias",
    "layer0_input_norm",
    "final_norm",
)


def make_draft(settings: HeadSettings, facts: TargetFacts, seed: int) -> Draft:
    """Return a float32 draft on the CPU, the same on every process.

    With `head.init_from`, every tensor that the head type has is taken over. Image parts that the
    other head lacks (a text draft from stage 1, a compressor) are initialised.

    Raises:
        ViSpecError: the other head does not fit the target or the head type.
    """
    if get_head_type(settings.kind).draft_vlm:
        return make_draft_vlm(settings, facts, seed)
    other = load_draft(settings.init_from) if settings.init_from else None
    if other is not None:
        if not isinstance(other, ViSpecDraft):
            raise ViSpecError(
                f"head.init_from {settings.init_from!r} is a draft VLM, head.kind is "
                f"{settings.kind!r}: use its kind, or start without it"
            )
        vocab_size, hidden_size = facts.embed_VD.shape
        check_against_target(other.config, hidden_size, vocab_size, facts.model_type)
    fields = {name: getattr(other.config, name) for name in _KEPT} if other else {}
    if settings.input_norm != "auto":
        fields["layer0_input_norm"] = settings.input_norm == "on"
    config = new_head_config(
        settings.kind,
        facts.text_config,
        target_model_type=facts.model_type,
        num_query_tokens=settings.num_query_tokens,
        compressor=settings.compressor,
        **fields,
    )
    draft = new_draft(config, facts.embed_VD.cpu(), seed)
    if other is not None:
        _take_over(draft, other, settings)
    return draft


def _take_over(draft: Draft, other: ViSpecDraft, settings: HeadSettings) -> None:
    given = {n: t for n, t in other.state_dict().items() if not n.startswith("embed_tokens.")}
    mine, theirs = draft.config, other.config
    if theirs.has_compressor and mine.compressor_spec != theirs.compressor_spec:
        raise ViSpecError(
            f"head.compressor is {mine.compressor}, head.init_from {settings.init_from!r} has "
            f"{theirs.compressor}: set it to that"
        )
    query = "img_adaptor.query"
    if query in given and mine.has_compressor and mine.global_feature:
        # Queries do not know of each other: the last one alone makes the global feature.
        given[query] = given[query][-1:]
    wanted = draft.state_dict()
    lost = sorted(name for name in given if name not in wanted)
    if lost:
        raise ViSpecError(
            f"head.kind {settings.kind!r} has no place for {', '.join(lost[:3])} of "
            f"head.init_from {settings.init_from!r}: use its kind, or start without it"
        )
    if query in given and given[query].shape != wanted[query].shape:
        raise ViSpecError(
            f"head.num_query_tokens is {settings.num_query_tokens}, head.init_from "
            f"{settings.init_from!r} has {len(given[query])}: set it to that"
        )
    draft.load_state_dict(given, strict=False)


def make_draft_vlm(settings: HeadSettings, facts: TargetFacts, seed: int) -> DraftVlm:
    """Return a float32 draft VLM on the CPU, the same on every process; see `head.trained`.

    Raises:
        ViSpecError: sizes are impossible, or `head.init_from` does not fit target or recipe.
    """
    embed_VD = facts.embed_VD.cpu()
    if not settings.init_from:
        config = _vlm_config(settings, facts, default_sizes(settings, facts.text_config))
        draft = new_draft_vlm(config, embed_VD, seed, facts.lm_head_VD.cpu())
    elif is_language_model(settings.init_from):
        model = read_language_model(settings.init_from, len(embed_VD))
        config = _vlm_config(settings, facts, model.fields)
        _check_sizes(settings, config)
        draft = new_draft_vlm(config, embed_VD, seed)
        model.load_into(draft)
    else:
        draft = _load_draft_vlm(settings, facts)
    if settings.trained == "projector":
        for name, parameter in draft.named_parameters():
            parameter.requires_grad_(name.startswith(PROJECTOR_PREFIX))
    return draft


def default_sizes(settings: HeadSettings, text_config: Any) -> dict[str, Any]:
    """Return fields of `HeadConfig` for a width and a number of heads (0: the target's).

    The MLP widens by the same factor as the target's.

    Raises:
        ViSpecError: the width is no multiple of the heads, or heads have an odd width.
    """
    theirs = text_config.hidden_size
    size = settings.hidden_size or theirs
    wide = getattr(text_config, "head_dim", None) or theirs // text_config.num_attention_heads
    heads = settings.num_heads or max(1, size // wide)
    if size % (2 * heads):
        raise ViSpecError(
            f"head.num_heads {heads} does not divide head.hidden_size {size} into heads of an "
            "even width: set both"
        )
    steps = round(text_config.intermediate_size * size / theirs / _MLP_MULTIPLE)
    fields: dict[str, Any] = {
        "hidden_size": size,
        "intermediate_size": max(1, steps) * _MLP_MULTIPLE,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": size // heads,
    }
    return fields | ({"num_hidden_layers": settings.num_layers} if settings.num_layers else {})


def _load_draft_vlm(settings: HeadSettings, facts: TargetFacts) -> DraftVlm:
    draft = load_draft(settings.init_from)
    if not isinstance(draft, DraftVlm):
        raise ViSpecError(
            f"head.init_from {settings.init_from!r} is a head on the target's states, head.kind "
            f"is {settings.kind!r}: start from a draft VLM or a language model, or without it"
        )
    vocab_size, hidden_size = facts.embed_VD.shape
    check_against_target(draft.config, hidden_size, vocab_size, facts.model_type)
    _check_sizes(settings, draft.config)
    return draft


def _vlm_config(
    settings: HeadSettings, facts: TargetFacts, fields: Mapping[str, Any]
) -> HeadConfig:
    return new_head_config(
        settings.kind, facts.text_config, target_model_type=facts.model_type, **fields
    )


def _check_sizes(settings: HeadSettings, config: HeadConfig) -> None:
    found = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
    }
    for name, value in found.items():
        wanted = getattr(settings, name)
        if wanted and wanted != value:
            raise ViSpecError(
                f"head.{name} is {wanted}, head.init_from {settings.init_from!r} has {value}: "
                "drop the setting"
            )


@torch.no_grad()
def new_draft(config: HeadConfig, embed_VD: Tensor, seed: int) -> Draft:
    """Return an initialised float32 draft on the CPU; the same seed gives the same weights.

    It starts as a plain sum. fc = [I | I] plus a little noise, so a text row is its token's
    embedding plus its state. img_fc = [I | 0] as in the reference, so training decides how much an
    image counts. Compressors initialise themselves. All other weights are normal, biases zero,
    norms one. For a draft VLM see `new_draft_vlm`.

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
    init_linears(draft, generator)
    _init_fusion(draft)
    if draft.img_adaptor is not None:
        std = config.adaptor_head_dim**-0.5
        nn.init.normal_(draft.img_adaptor.query, std=std, generator=generator)
    if draft.compressor is not None:
        draft.compressor.init_weights(generator)
    if draft.embed_tokens is not None:
        draft.embed_tokens.weight.copy_(embed_VD)
        draft.embed_tokens.weight.requires_grad_(False)
    return draft


def _init_fusion(draft: ViSpecDraft) -> None:
    eye_DD = torch.eye(draft.config.hidden_size)
    draft.fc.weight.mul_(FUSION_NOISE).add_(torch.cat((eye_DD, eye_DD), dim=1))
    if draft.img_fc is not None:
        draft.img_fc.weight.copy_(torch.cat((eye_DD, torch.zeros_like(eye_DD)), dim=1))


@torch.no_grad()
def init_linears(module: nn.Module, generator: torch.Generator) -> None:
    """Set normal weights and zero biases in every linear layer."""
    for one in module.modules():
        if isinstance(one, nn.Linear):
            std = WEIGHT_SCALE * one.in_features**-0.5
            nn.init.normal_(one.weight, std=std, generator=generator)
            if one.bias is not None:
                nn.init.zeros_(one.bias)


@torch.no_grad()
def new_draft_vlm(
    config: HeadConfig, embed_VD: Tensor, seed: int, lm_head_VD: Tensor | None = None
) -> DraftVlm:
    """Return an initialised float32 draft VLM on the CPU; the same seed gives the same weights.

    All weights are normal, biases zero, norms one. At the target's width the tables start as the
    target's, which saves many steps. They are trained like everything else.

    Args:
        embed_VD, lm_head_VD: the target's tables, of the target's width; None: not known.
    """
    draft = DraftVlm(config)
    generator = torch.Generator().manual_seed(seed)
    init_linears(draft, generator)
    # As long as what the projector makes of an image embedding: both are rows of one input.
    std = WEIGHT_SCALE * config.hidden_size**-0.5
    nn.init.normal_(draft.embed_tokens.weight, std=std, generator=generator)
    if embed_VD.shape == draft.embed_tokens.weight.shape:
        draft.embed_tokens.weight.copy_(embed_VD)
        if draft.lm_head is not None and lm_head_VD is not None:
            draft.lm_head.weight.copy_(lm_head_VD)
    return draft
