"""The draft a run starts from: a fresh one, or one made from another head's weights."""

from __future__ import annotations

from typing import Any

from vllm_vispec.heads.folder import load_draft
from vllm_vispec.heads.target import check_against_target
from vllm_vispec.reference import Draft, ViSpecDraft
from vllm_vispec.train.config import HeadSettings
from vllm_vispec.train.draft_vlm import make_draft_vlm
from vllm_vispec.train.kinds import get_kind, new_draft, new_head_config
from vllm_vispec.train.source import Facts
from vllm_vispec.utils.errors import ViSpecError

# What a head keeps of the one it starts from; its kind decides about images.
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


def make_draft(settings: HeadSettings, facts: Facts, seed: int) -> Draft:
    """A float32 draft on the CPU, the same on every process.

    With `head.init_from` every tensor that the kind has is taken over; image parts that the other
    head lacks (a text draft from stage 1, a compressor) start fresh. The target's embedding table
    is used. Draft VLMs: see `train.draft_vlm`.

    Raises:
        ViSpecError: the head does not fit the target or the kind.
    """
    if get_kind(settings.kind).draft_vlm:
        return make_draft_vlm(settings, facts, seed)
    if not settings.init_from:
        config = new_head_config(
            settings.kind,
            facts.text_config,
            target_model_type=facts.model_type,
            num_query_tokens=settings.num_query_tokens,
            **_chosen(settings),
        )
        return new_draft(config, facts.embed_VD.cpu(), seed)
    other = load_draft(settings.init_from)
    if not isinstance(other, ViSpecDraft):
        raise ViSpecError(
            f"head.init_from {settings.init_from!r} is a draft VLM, head.kind is "
            f"{settings.kind!r}: use its kind, or start fresh"
        )
    vocab_size, hidden_size = facts.embed_VD.shape
    check_against_target(other.config, hidden_size, vocab_size, facts.model_type)
    config = new_head_config(
        settings.kind,
        facts.text_config,
        target_model_type=facts.model_type,
        num_query_tokens=settings.num_query_tokens,
        **{name: getattr(other.config, name) for name in _KEPT} | _chosen(settings),
    )
    draft = new_draft(config, facts.embed_VD.cpu(), seed)
    _take_over(draft, other, settings)
    return draft


def _chosen(settings: HeadSettings) -> dict[str, Any]:
    """What the recipe says beside the kind."""
    chosen: dict[str, Any] = {"compressor": settings.compressor}
    if settings.input_norm != "auto":
        chosen["layer0_input_norm"] = settings.input_norm == "on"
    return chosen


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
            f"head.init_from {settings.init_from!r}: use its kind, or start fresh"
        )
    if query in given and given[query].shape != wanted[query].shape:
        raise ViSpecError(
            f"head.num_query_tokens is {settings.num_query_tokens}, head.init_from "
            f"{settings.init_from!r} has {len(given[query])}: set it to that"
        )
    draft.load_state_dict(given, strict=False)
