"""The draft VLM a run starts from: fresh, that of an earlier stage, or a small language model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.folder import load_draft
from vllm_vispec.heads.target import check_against_target
from vllm_vispec.reference import DraftVlm
from vllm_vispec.reference.modeling_draft_vlm import PROJECTOR_PREFIX
from vllm_vispec.train.config import HeadSettings
from vllm_vispec.train.fresh import new_draft_vlm
from vllm_vispec.train.kinds import new_head_config
from vllm_vispec.train.language_model import is_language_model, read_language_model
from vllm_vispec.train.source import Facts
from vllm_vispec.utils.errors import ViSpecError

# Widths of MLPs are multiples of this.
_MLP_MULTIPLE = 8


def make_draft_vlm(settings: HeadSettings, facts: Facts, seed: int) -> DraftVlm:
    """A float32 draft VLM on the CPU, the same on every process; frozen where the recipe says so.

    Raises:
        ViSpecError: sizes are impossible, or `head.init_from` does not fit target or recipe.
    """
    if not settings.init_from:
        draft = _fresh(settings, facts, seed)
    elif is_language_model(settings.init_from):
        draft = _from_language_model(settings, facts, seed)
    else:
        draft = _from_head(settings, facts)
    if settings.trained == "projector":
        for name, parameter in draft.named_parameters():
            parameter.requires_grad_(name.startswith(PROJECTOR_PREFIX))
    return draft


def _fresh(settings: HeadSettings, facts: Facts, seed: int) -> DraftVlm:
    sizes = fresh_sizes(settings, facts.text_config)
    config = _config(settings, facts, sizes)
    return new_draft_vlm(config, facts.embed_VD.cpu(), seed, facts.lm_head_VD.cpu())


def fresh_sizes(settings: HeadSettings, text_config: Any) -> dict[str, Any]:
    """Fields of `HeadConfig` for a width and a number of heads, the target's where they are 0.

    The MLP is as many times wider as the target's.

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


def _from_language_model(settings: HeadSettings, facts: Facts, seed: int) -> DraftVlm:
    model = read_language_model(settings.init_from, facts.embed_VD.shape[0])
    config = _config(settings, facts, dict(model.fields))
    _check_sizes(settings, config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
    draft = new_draft_vlm(config, facts.embed_VD.cpu(), seed)
    model.load_into(draft, config)
    return draft


def _from_head(settings: HeadSettings, facts: Facts) -> DraftVlm:
    draft = load_draft(Path(settings.init_from))
    if not isinstance(draft, DraftVlm):
        raise ViSpecError(
            f"head.init_from {settings.init_from!r} is a head on the target's states, head.kind "
            f"is {settings.kind!r}: start from a draft VLM or a language model, or fresh"
        )
    config, (vocab_size, hidden_size) = draft.config, facts.embed_VD.shape
    check_against_target(config, hidden_size, vocab_size, facts.model_type)
    _check_sizes(settings, config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
    return draft


def _config(settings: HeadSettings, facts: Facts, fields: dict[str, Any]) -> HeadConfig:
    return new_head_config(
        settings.kind, facts.text_config, target_model_type=facts.model_type, **fields
    )


def _check_sizes(settings: HeadSettings, layers: int, size: int, heads: int) -> None:
    found = {"num_layers": layers, "hidden_size": size, "num_heads": heads}
    for name, value in found.items():
        wanted = getattr(settings, name)
        if wanted and wanted != value:
            raise ViSpecError(
                f"head.{name} is {wanted}, head.init_from {settings.init_from!r} has {value}: "
                "drop the setting"
            )
