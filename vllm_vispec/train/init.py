"""The draft that a run starts from: new, or made from another head or a language model.

Tensor names end in their shape: V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vllm_vispec.compressors.spec import QUERY
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.folder import HeadInfo, load_draft
from vllm_vispec.heads.target import check_against_target
from vllm_vispec.reference import Draft, DraftVlm, ViSpecDraft
from vllm_vispec.reference.modeling_draft_vlm import PROJECTOR_PREFIX
from vllm_vispec.train.config import HeadSettings
from vllm_vispec.train.head_types import compressor_of, get_head_type
from vllm_vispec.train.language_model import (
    is_language_model,
    load_language_model,
    read_language_model,
)
from vllm_vispec.train.published import LANGUAGE_PREFIXES, PublishedModel
from vllm_vispec.train.target import TargetFacts
from vllm_vispec.utils.errors import ViSpecError

# Of a draft VLM, times in_features ** -0.5; the usual 0.02 at a width of about 1200.
WEIGHT_SCALE = 0.7
# Decoder layers of a draft VLM.
DRAFT_VLM_LAYERS = 4
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


def new_head_config(
    head_type: str,
    text_config: Any,
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
        text_config: the transformers config of the target's text model.
        target_model_type: `model_type` of the whole target, e.g. "qwen2_5_vl".
        num_query_tokens: 2 in the reference: one row per image and the global feature. With another
            compressor than ViSpec's adaptor there is one, the global feature's.
        compressor: see `compressor_of`.
        changes: other fields of `HeadConfig`, over these defaults.

    Raises:
        ViSpecError: unknown head type or an impossible value.
    """
    chosen, made_by = get_head_type(head_type), compressor_of(head_type, compressor)
    heads = text_config.num_attention_heads
    fields: dict[str, Any] = {
        "target_model_type": target_model_type,
        "hidden_size": text_config.hidden_size,
        "intermediate_size": text_config.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": _head_dim(text_config),
        "vocab_size": text_config.vocab_size,
        "max_position_embeddings": text_config.max_position_embeddings,
        "rope_theta": _rope_theta(text_config),
        "rms_norm_eps": text_config.rms_norm_eps,
        "num_query_tokens": num_query_tokens if made_by == QUERY else 1,
        "compressor": made_by,
        "qkv_bias": True,
        "fc_bias": True,
        "layer0_input_norm": chosen.input_norm,
        "final_norm": False,
        "has_embed_tokens": False,
        "compress": chosen.compress,
        "global_feature": chosen.global_feature,
    }
    if chosen.draft_vlm:
        fields |= {
            "num_hidden_layers": DRAFT_VLM_LAYERS,
            "vision_size": text_config.hidden_size,
            "num_query_tokens": 1,
            "fc_bias": False,
            "final_norm": True,
            "has_embed_tokens": True,
        }
    return HeadConfig(**(fields | changes))


def _head_dim(text_config: Any) -> int:
    # Where layers differ (Gemma 4), that of the first.
    first = getattr(text_config, "per_layer_config", [text_config])[0]
    width = getattr(first, "head_dim", None)
    return width or text_config.hidden_size // text_config.num_attention_heads


def _rope_theta(text: Any) -> float:
    """transformers 5 keeps the base in `rope_parameters`, older versions in `rope_theta`.

    Where kinds of layers have one each (Gemma), the draft's layer takes that of full attention.
    """
    parameters = getattr(text, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)
    theta = parameters.get("rope_theta") or getattr(text, "rope_theta", None)
    if theta is None:
        raise ViSpecError(
            "the target's text config states no rope_theta: set rope_theta of the head yourself"
        )
    return float(theta)


def make_draft(
    settings: HeadSettings, facts: TargetFacts, seed: int, published: HeadInfo | None = None
) -> Draft:
    """Return a float32 draft on the CPU, the same on every process.

    With `head.init_from`, every tensor that the head type has is taken over. Image parts that the
    other head lacks (a text draft from stage 1, a compressor) are initialised. A draft VLM may
    start from a language model; see `head.trained`.

    Args:
        published: what `published.find_start` says of `head.init_from`.

    Raises:
        ViSpecError: sizes are impossible, or `head.init_from` does not fit target or recipe.
    """
    is_vlm = get_head_type(settings.kind).draft_vlm
    if published is not None:
        draft: Draft = PublishedModel.load(published, setting="head.init_from")
    elif is_vlm and settings.init_from and is_language_model(settings.init_from):
        draft = _from_language_model(settings, facts, seed)
    elif settings.init_from:
        other = _load_other(settings, facts)
        draft = other if is_vlm else _from_head(other, settings, facts, seed)
    else:
        changes = default_sizes(settings, facts.text_config) if is_vlm else _norm(settings)
        config = _new_config(settings, facts, changes)
        draft = new_draft(config, facts.embed_VD.cpu(), seed, facts.lm_head_VD.cpu())
    return as_asked(draft, settings)


def as_asked(draft: Draft, settings: HeadSettings) -> Draft:
    """Freeze what `head.trained` leaves out; returns the draft.

    Raises:
        ViSpecError: sizes of a draft VLM differ from those of `head.init_from`.
    """
    if draft.config.is_draft_vlm:
        _check_sizes(settings, draft.config)
    for name, parameter in draft.named_parameters() if settings.trained != "all" else ():
        is_language = (
            name.startswith(LANGUAGE_PREFIXES)
            if isinstance(draft, PublishedModel)
            else not name.startswith(PROJECTOR_PREFIX)
        )
        parameter.requires_grad_(is_language == (settings.trained == "language_model"))
    return draft


def _new_config(
    settings: HeadSettings, facts: TargetFacts, changes: Mapping[str, Any]
) -> HeadConfig:
    return new_head_config(
        settings.kind,
        facts.text_config,
        target_model_type=facts.model_type,
        num_query_tokens=settings.num_query_tokens,
        compressor=settings.compressor,
        **changes,
    )


def _norm(settings: HeadSettings) -> dict[str, Any]:
    on = settings.input_norm
    return {} if on == "auto" else {"layer0_input_norm": on == "on"}


def _load_other(settings: HeadSettings, facts: TargetFacts) -> Draft:
    other = load_draft(settings.init_from)
    if other.config.is_draft_vlm != get_head_type(settings.kind).draft_vlm:
        what = "a draft VLM" if other.config.is_draft_vlm else "a head on the target's states"
        raise ViSpecError(
            f"head.init_from {settings.init_from!r} is {what}, head.kind is {settings.kind!r}: "
            "start from one of its kind (a draft VLM also from a language model), or without it"
        )
    vocab_size, hidden_size = facts.embed_VD.shape
    check_against_target(other.config, hidden_size, vocab_size, facts.model_type)
    return other


def _from_head(other: Draft, settings: HeadSettings, facts: TargetFacts, seed: int) -> Draft:
    kept = {name: getattr(other.config, name) for name in _KEPT}
    draft = new_draft(
        _new_config(settings, facts, kept | _norm(settings)), facts.embed_VD.cpu(), seed
    )
    given = {n: t for n, t in other.state_dict().items() if not n.startswith("embed_tokens.")}
    mine, theirs, where = draft.config, other.config, f"head.init_from {settings.init_from!r}"
    if theirs.has_compressor and mine.compressor_spec != theirs.compressor_spec:
        raise ViSpecError(
            f"head.compressor is {mine.compressor}, {where} has {theirs.compressor}: set it to that"
        )
    query = "img_adaptor.query"
    if query in given and mine.has_compressor and mine.global_feature:
        # Queries do not know of each other: the last one alone makes the global feature.
        given[query] = given[query][-1:]
    wanted = draft.state_dict()
    lost = sorted(name for name in given if name not in wanted)
    if lost:
        raise ViSpecError(
            f"head.kind {settings.kind!r} has no place for {', '.join(lost[:3])} of {where}: use "
            "its kind, or start without it"
        )
    if query in given and given[query].shape != wanted[query].shape:
        raise ViSpecError(
            f"head.num_query_tokens is {settings.num_query_tokens}, {where} has "
            f"{len(given[query])}: set it to that"
        )
    draft.load_state_dict(given, strict=False)
    return draft


def _from_language_model(settings: HeadSettings, facts: TargetFacts, seed: int) -> Draft:
    if settings.trained == "language_model":
        raise ViSpecError(
            f"head.trained language_model would freeze a new projector: {settings.init_from!r} has "
            "none; train all, or the projector first"
        )
    embed_VD = facts.embed_VD.cpu()
    fields, tensors = read_language_model(settings.init_from, len(embed_VD))
    draft = new_draft(_new_config(settings, facts, fields), embed_VD, seed)
    load_language_model(draft, tensors, settings.init_from)
    return draft


def default_sizes(settings: HeadSettings, text_config: Any) -> dict[str, Any]:
    """Return fields of `HeadConfig` for a width and a number of heads (0: the target's).

    The MLP widens by the same factor as the target's.

    Raises:
        ViSpecError: the width is no multiple of the heads, or heads have an odd width.
    """
    theirs = text_config.hidden_size
    size = settings.hidden_size or theirs
    heads = settings.num_heads or max(1, size // _head_dim(text_config))
    if size % (2 * heads):
        raise ViSpecError(
            f"head.num_heads {heads} does not divide head.hidden_size {size} into heads of an "
            "even width: set both"
        )
    steps = round(text_config.intermediate_size * size / theirs / _MLP_MULTIPLE)
    return {
        "num_hidden_layers": settings.num_layers or DRAFT_VLM_LAYERS,
        "hidden_size": size,
        "intermediate_size": max(1, steps) * _MLP_MULTIPLE,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": size // heads,
    }


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
def new_draft(
    config: HeadConfig, embed_VD: Tensor, seed: int, lm_head_VD: Tensor | None = None
) -> Draft:
    """Return an initialised float32 draft on the CPU; the same seed gives the same weights.

    A head starts as PyTorch initialises its layers, for states of size 1: see
    `vllm_vispec.train.units`. As in the reference img_fc = [I | 0], so training decides how much an
    image counts. Compressors initialise themselves.

    A draft VLM of the target's width starts with the target's tables, which saves many steps. They
    are trained like everything else.

    Args:
        embed_VD, lm_head_VD: the target's tables, for a draft VLM; a head has none of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    if config.is_draft_vlm:
        return _new_draft_vlm(config, embed_VD, lm_head_VD, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = ViSpecDraft(config)
    if draft.compressor is not None:
        draft.compressor.init_weights(generator)
    return draft


def _new_draft_vlm(
    config: HeadConfig, embed_VD: Tensor, lm_head_VD: Tensor | None, generator: torch.Generator
) -> DraftVlm:
    draft = DraftVlm(config)
    _init_linears(draft, generator)
    # As long as what the projector makes of an image embedding: both are rows of one input.
    std = WEIGHT_SCALE * config.hidden_size**-0.5
    nn.init.normal_(draft.embed_tokens.weight, std=std, generator=generator)
    if embed_VD.shape == draft.embed_tokens.weight.shape:
        draft.embed_tokens.weight.copy_(embed_VD)
        if draft.lm_head is not None and lm_head_VD is not None:
            draft.lm_head.weight.copy_(lm_head_VD)
    return draft


def _init_linears(module: nn.Module, generator: torch.Generator) -> None:
    """Set normal weights and zero biases in every linear layer."""
    for one in module.modules():
        if isinstance(one, nn.Linear):
            std = WEIGHT_SCALE * one.in_features**-0.5
            nn.init.normal_(one.weight, std=std, generator=generator)
            if one.bias is not None:
                nn.init.zeros_(one.bias)
