"""Does a published model fit a target as its draft?  Found out before anything is loaded."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from vllm.config import ModelConfig
from vllm.tokenizers.registry import get_tokenizer

from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.utils.errors import ViSpecError

# What decides how many tokens an image has, where they lie, and what a tower's tensors hold. Limits
# of pixels do not: the target's processor makes the tensors.
_VISION = "patch_size image_size spatial_merge_size temporal_patch_size tokens_per_second"
_MODEL = (
    "image_seq_length image_grid_pinpoints vision_feature_select_strategy vision_aspect_ratio "
    "downsample_ratio scale_factor spatial_merge_size mm_tokens_per_image query_num"
)
_PROCESSOR = (
    "patch_size merge_size temporal_patch_size crop_size image_mean image_std do_rescale "
    "rescale_factor do_normalize"
)


def check_fit(name: str, own: ModelConfig, target: ModelConfig) -> None:
    """Refuse a draft, called ``name`` by the user, that does not read what the target reads.

    Raises:
        ViSpecError: Names the first difference.
    """
    of_images = (_family, _geometry) if own.is_multimodal_model else ()
    checks = (check(own, target) for check in (_kind, *of_images, _tokenizer))
    for problem in chain.from_iterable(checks):
        raise ViSpecError(f"draft {name} does not fit target {target.model}: {problem}")


def size_warning(head: HeadConfig, target: ModelConfig) -> str | None:
    """Say that a draft's text layers are as large as its target's or larger; None if they are not.

    Args:
        head: The draft.
    """
    ours = head.num_hidden_layers, head.hidden_size
    theirs = int(target.hf_text_config.num_hidden_layers), target.get_hidden_size()
    if ours[0] * ours[1] ** 2 < theirs[0] * theirs[1] ** 2:
        return None
    return (
        f"the draft has {ours[0]} layers of width {ours[1]}, the target {theirs[0]} of "
        f"{theirs[1]}: a draft must be much smaller to make the target faster"
    )


def _kind(own: ModelConfig, target: ModelConfig) -> Iterator[str]:
    if not target.is_multimodal_model:
        yield 'the target takes no images; use vLLM\'s own "method": "draft_model"'
    has_other_layers = own.is_hybrid or own.is_attention_free or own.use_mla
    is_local = own.get_sliding_window() or getattr(own.hf_text_config, "attention_chunk_size", None)
    if has_other_layers or is_local:
        yield "it has layers other than full attention"
    if own.is_mm_prefix_lm:
        yield "tokens of an image look at those behind them, which drafts cannot"
    if own.max_model_len < target.max_model_len:
        yield (
            f"it reads {own.max_model_len} tokens at most; set --max-model-len to that, the "
            f"target has {target.max_model_len}"
        )
    settings = target.multimodal_config
    if settings is not None and settings.video_pruning_rate:
        yield f"video_pruning_rate={settings.video_pruning_rate} drops video tokens; set it to 0"
    if target.enable_prompt_embeds or getattr(settings, "enable_mm_embeds", False):
        yield "prompts with embeddings hold the target's, not the draft's; do not enable them"


def _family(own: ModelConfig, target: ModelConfig) -> Iterator[str]:
    both = own, target
    ours, theirs = (str(one.hf_config.model_type).removesuffix("_moe") for one in both)
    if ours != theirs:
        yield f"it is of family {ours}, the target of {theirs}"
    axes, target_axes = (one.mrope_num_dims if one.uses_mrope else 1 for one in both)
    if axes != target_axes:
        yield f"its positions have {axes} axes, the target's {target_axes}"


def _geometry(own: ModelConfig, target: ModelConfig) -> Iterator[str]:
    models = own.hf_config, target.hf_config
    towers = (_plain(getattr(one, "vision_config", {})) for one in models)
    processors = own.hf_image_processor_config, target.hf_image_processor_config
    if not processors[0]:
        yield (
            "it has no preprocessor_config.json or processor_config.json, so nobody knows whether "
            "it was trained on images normalised as the target's: download it again"
        )
    for where, names, (ours, theirs) in (
        ("vision_config", _VISION, towers),
        ("config.json", _MODEL, map(_plain, models)),
        ("the image processor", _PROCESSOR, processors),
    ):
        for name in names.split() if ours and theirs else ():
            mine, other = ours.get(name), theirs.get(name)
            # Files written by older libraries leave out what is as usual.
            if mine is not None and other is not None and mine != other:
                yield f"{name} in {where} is {mine}, the target's {other}"


def _plain(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, dict) else dict(config.to_dict())


def _tokenizer(own: ModelConfig, target: ModelConfig) -> Iterator[str]:
    mine = _load_tokenizer(own.model, own.revision).get_vocab()
    ours = {number: token for token, number in mine.items()}
    tokenizer = _load_tokenizer(target.tokenizer, target.tokenizer_revision)
    theirs = tokenizer.get_vocab()
    # A text model need not know the tokens of images.
    unneeded = set() if own.is_multimodal_model else tokenizer.get_added_vocab().keys()
    for token, number in sorted(theirs.items(), key=lambda item: item[1]):
        if ours.get(number) != token and (number in ours or token not in unneeded):
            yield f"token {number} is {ours.get(number)!r}, the target's is {token!r}"
    if own.is_multimodal_model and max(theirs.values()) >= own.get_vocab_size():
        yield f"its table has {own.get_vocab_size()} rows, fewer than the target has tokens"


def _load_tokenizer(name: str, revision: str | None) -> Any:
    try:
        return get_tokenizer(name, trust_remote_code=False, revision=revision)
    # What a broken file raises is the tokenizer library's secret.
    except Exception as error:
        raise ViSpecError(
            f"the tokenizer of {name} cannot be read, so nobody knows whether draft and target "
            "have the same: download it again"
        ) from error
