"""Settings that cannot have their effect, said in one line each when an engine is configured."""

from collections.abc import Iterator
from dataclasses import fields
from itertools import chain
from typing import Any

from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.spec_decode.options import EngineOptions
from vllm_vispec.trees.setting import has_branches, read_tree
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

_DEFAULTS = {option.name: option.default for option in fields(EngineOptions)}


def note_settings_without_effect(vllm_config: Any) -> None:
    """Log a line for each setting that will not do what it says.

    Args:
        vllm_config: vLLM's finished configuration, whose draft is ours.
    """
    lines = _tree_lines(vllm_config), _schedule_lines(vllm_config), _image_table_lines(vllm_config)
    for line in chain.from_iterable(lines):
        logger.warning("speculative config: %s", line)


def _tree_lines(vllm_config: Any) -> Iterator[str]:
    settings = read_tree(vllm_config)
    if settings is not None and settings.width > 1 and not has_branches(vllm_config):
        yield (
            f"tree has no branches, since no load drafts more than the {settings.levels} tokens of "
            "one path: these are drafted and verified as a chain; raise num_speculative_tokens "
            "(29 suits most heads)"
        )


def _schedule_lines(vllm_config: Any) -> Iterator[str]:
    speculative = vllm_config.speculative_config
    most, requests = speculative.num_speculative_tokens, vllm_config.scheduler_config.max_num_seqs
    for first, last, count in speculative.num_speculative_tokens_per_batch_size or ():
        entry = f"[{first}, {last}, {count}] of num_speculative_tokens_per_batch_size"
        if count > most:
            yield f"{entry} drafts {most} tokens, since num_speculative_tokens={most} is the most"
        if first > requests:
            yield f"{entry} is never used, since max_num_seqs={requests}"


def _image_table_lines(vllm_config: Any) -> Iterator[str]:
    hf_config = vllm_config.speculative_config.draft_model_config.hf_config
    size = EngineOptions.from_hf_config(hf_config).image_table_size
    if size == _DEFAULTS["image_table_size"]:
        return
    if not HeadConfig.from_config_json(hf_config.to_dict()).has_adaptor:
        yield f"image_table_size={size} has no effect, since this head keeps no rows of images"
    elif not vllm_config.model_config.supports_multimodal_inputs:
        yield f"image_table_size={size} has no effect, since this engine takes no images"
