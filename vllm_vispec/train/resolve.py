"""Settings that follow others: what "auto" means for a head, and what does not go together."""

from __future__ import annotations

from dataclasses import replace

from vllm_vispec.compressors.spec import QUERY
from vllm_vispec.train.config import HeadSettings, TrainConfig
from vllm_vispec.train.kinds import HEAD_KINDS, compressor_of, get_kind
from vllm_vispec.train.losses import STATE_TERMS, get_loss
from vllm_vispec.utils.errors import ViSpecError

# The loss of a head: SpecVLM distils with a compressor, ViSpec with its adaptor and without any;
# a draft VLM has no states that could be compared.
COMPRESSOR_LOSS, OTHER_LOSS, DRAFT_VLM_LOSS = "specvlm", "vispec", "kl"
# Settings that mean something for draft VLMs only.
_DRAFT_VLM_ONLY = ("num_layers", "hidden_size", "num_heads", "trained")


def resolve(config: TrainConfig) -> TrainConfig:
    """The recipe with the loss its head trains on; checks the head's kind and compressor.

    Raises:
        ViSpecError: kind or compressor are unknown, or settings do not go together.
    """
    made_by = compressor_of(config.head.kind, config.head.compressor)
    is_vlm = get_kind(config.head.kind).draft_vlm
    if config.loss.name == "auto":
        name = OTHER_LOSS if made_by == QUERY else COMPRESSOR_LOSS
        name = DRAFT_VLM_LOSS if is_vlm else name
        config = replace(config, loss=replace(config.loss, name=name))
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
            "head.trained projector would freeze a fresh draft VLM's random weights: set "
            "head.init_from to a language model's folder, or train all"
        )


def _check_head(config: TrainConfig) -> None:
    fresh = HeadSettings()
    for name in _DRAFT_VLM_ONLY:
        if getattr(config.head, name) != getattr(fresh, name):
            kinds = [kind for kind, one in HEAD_KINDS.items() if one.draft_vlm]
            raise ViSpecError(
                f"head.{name} is {getattr(config.head, name)!r}, which head.kind "
                f"{config.head.kind!r} does not have: drop it, or use {', '.join(kinds)}"
            )
