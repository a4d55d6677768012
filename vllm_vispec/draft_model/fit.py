"""Does a published model fit a target as its draft?  Found out before anything is loaded."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from vllm.config import ModelConfig
from vllm.tokenizers.registry import get_tokenizer

from vllm_vispec.heads.folder import read_json
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

_PROCESSOR = "preprocessor_config.json"
# What decides how many tokens an image has, where they lie, and what a tower's tensors hold. Limits
# of pixels do not: the target's processor makes the tensors.
_OF_VISION = ("patch_size", "image_size", "spatial_merge_size", "temporal_patch_size")
_OF_MODEL = (
    "image_seq_length",
    "image_grid_pinpoints",
    "vision_feature_select_strategy",
    "downsample_ratio",
)
_OF_PROCESSOR = (
    "patch_size",
    "merge_size",
    "temporal_patch_size",
    "crop_size",
    "image_mean",
    "image_std",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
)


def check_fit(name: str, own: ModelConfig, target: ModelConfig) -> None:
    """Refuse a draft that does not read what the target reads.

    Args:
        name: What the user calls the draft.
        own: The draft's configuration.
        target: The target's.

    Raises:
        ViSpecError: Names the first difference.
    """
    for problem in chain(_kind(own, target), _geometry(own, target), _tokenizer(own, target)):
        raise ViSpecError(f"draft {name} does not fit target {target.model}: {problem}")
    ours, theirs = _size(own), _size(target)
    if ours[0] * ours[1] ** 2 > theirs[0] * theirs[1] ** 2:
        logger.warning(
            "ViSpec: draft %s has %d layers of width %d, the target %d of %d: a draft larger than "
            "its target makes it slower",
            name,
            *ours,
            *theirs,
        )


def _size(config: ModelConfig) -> tuple[int, int]:
    return int(config.hf_text_config.num_hidden_layers), config.get_hidden_size()


def _kind(own: ModelConfig, target: ModelConfig) -> Iterator[str]:
    if not target.is_multimodal_model:
        yield 'the target takes no images; use vLLM\'s own "method": "draft_model"'
    if not own.is_multimodal_model:
        yield "it is a text model, whose image rows cannot be masked yet; give a VLM of the family"
    ours, theirs = (_family(config) for config in (own, target))
    if ours != theirs:
        yield f"it is of family {ours}, the target of {theirs}"
    if own.uses_mrope != target.uses_mrope:
        yield "one of them has M-RoPE and the other has not"
    if own.is_hybrid or own.is_attention_free or own.get_sliding_window() is not None:
        yield "it has layers other than full attention"
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


def _family(config: ModelConfig) -> str:
    return str(config.hf_config.model_type).removesuffix("_moe")


def _geometry(own: ModelConfig, target: ModelConfig) -> Iterator[str]:
    both = own.hf_config, target.hf_config
    parts: tuple[tuple[str, tuple[str, ...], list[Any]], ...] = (
        ("vision_config", _OF_VISION, [_plain(getattr(one, "vision_config", {})) for one in both]),
        ("config.json", _OF_MODEL, [_plain(one) for one in both]),
        (_PROCESSOR, _OF_PROCESSOR, [_processor(one.model) for one in (own, target)]),
    )
    for where, names, (ours, theirs) in parts:
        for name in names if ours and theirs else ():
            if ours.get(name) != theirs.get(name):
                yield f"{name} in {where} is {ours.get(name)}, the target's {theirs.get(name)}"


def _plain(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, dict) else dict(config.to_dict())


def _processor(model: str) -> dict[str, Any]:
    """Return what a folder says about its image processor; a hub id's is not fetched for this."""
    folder = Path(model)
    if (folder / _PROCESSOR).is_file():
        return read_json(folder / _PROCESSOR)
    file = folder / "processor_config.json"
    found = read_json(file).get("image_processor") if file.is_file() else None
    return found if isinstance(found, dict) else {}


def _tokenizer(own: ModelConfig, target: ModelConfig) -> Iterator[str]:
    ours = {number: token for token, number in _vocabulary(own.model, own.revision).items()}
    theirs = _vocabulary(target.tokenizer, target.tokenizer_revision)
    for token, number in sorted(theirs.items(), key=lambda item: item[1]):
        if ours.get(number) != token:
            yield f"token {number} is {ours.get(number)!r}, the target's is {token!r}"
    if max(theirs.values()) >= own.get_vocab_size():
        yield f"its table has {own.get_vocab_size()} rows, fewer than the target has tokens"


def _vocabulary(name: str, revision: str | None) -> dict[str, int]:
    try:
        tokenizer = get_tokenizer(name, trust_remote_code=False, revision=revision)
    except (OSError, ValueError) as error:
        raise ViSpecError(
            f"the tokenizer of {name} cannot be read, so nobody knows whether draft and target "
            "have the same: download it again"
        ) from error
    return dict(tokenizer.get_vocab())
