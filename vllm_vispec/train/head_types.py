"""Head types to train: ViSpec and the baselines of its ablation; what a recipe means for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_vispec.compressors.spec import IDENTITY, QUERY, parse_compressor
from vllm_vispec.train.config import HeadSettings, TrainConfig
from vllm_vispec.train.losses import STATE_TERMS, term_weights
from vllm_vispec.utils.errors import ViSpecError

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
        compressor: what makes an image's tokens unless `head.compressor` says otherwise.
        input_norm: whether the decoder layer norms its input unless `head.input_norm` says so.
        draft_vlm: an independent small vision language model.
    """

    compress: bool = False
    global_feature: bool = False
    text_only: bool = False
    compressor: str = QUERY
    input_norm: bool = False
    draft_vlm: bool = False


HEAD_TYPES: Mapping[str, HeadType] = {
    # Compressed images and their global feature; its ablation has one of them.
    "vispec": HeadType(compress=True, global_feature=True),
    "vispec_no_global": HeadType(compress=True),
    "vispec_no_compress": HeadType(global_feature=True),
    # EAGLE that sees every image token, or was trained on text only.
    "eagle_vlm": HeadType(),
    "eagle_text": HeadType(text_only=True),
    # SpecVLM (arXiv 2509.11815): elastic compressor, norm on the draft's input.
    "specvlm": HeadType(compress=True, compressor="select", input_norm=True),
    "specvlm_global": HeadType(
        compress=True, global_feature=True, compressor="select", input_norm=True
    ),
    # MSD (arXiv 2505.14260): image rows are the image's embeddings, text rows EAGLE's.
    "msd": HeadType(compress=True, compressor=IDENTITY),
    # Spec-LLaVA (arXiv 2509.11961) and MASSV (arXiv 2505.10526): an independent small model.
    "draft_vlm": HeadType(input_norm=True, draft_vlm=True),
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


def resolve(config: TrainConfig) -> TrainConfig:
    """Return the recipe with the loss its head trains on; checks head type and compressor.

    Raises:
        ViSpecError: head type or compressor is unknown, or settings do not go together.
    """
    made_by = compressor_of(config.head.kind, config.head.compressor)
    is_vlm = get_head_type(config.head.kind).draft_vlm
    if config.loss.name == "auto":
        of_head = OTHER_LOSS if made_by == QUERY else COMPRESSOR_LOSS
        loss = config.loss.model_copy(update={"name": DRAFT_VLM_LOSS if is_vlm else of_head})
        config = config.model_copy(update={"loss": loss})
    term_weights(config.loss.name, config.loss.weights)
    if config.teacher.engine == "vllm" and config.teacher.mode != "offline":
        raise ViSpecError(
            "teacher.engine vllm stores states before training: set teacher.mode to offline"
        )
    (_check_draft_vlm if is_vlm else _check_head)(config)
    return config


def _check_draft_vlm(config: TrainConfig) -> None:
    loss = config.loss
    terms = STATE_TERMS & set(term_weights(loss.name, loss.weights))
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
    if config.head.trained != "all" and not config.head.init_from:
        raise ViSpecError(
            f"head.trained {config.head.trained} would freeze a new draft VLM's random weights: "
            "set head.init_from to a language model's folder, or train all"
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
