"""Teaches vLLM's configuration about ViSpec heads.

Inside vLLM the method stays ``eagle``: that is what the draft is, and every feature that asks for
EAGLE keeps working.  The draft is told apart by its registered architecture alone.
"""

import copy
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import LlamaConfig
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.transformers_utils.config import register_config_parser
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from vllm_vispec.compat.check import require
from vllm_vispec.compat.groups import check_features
from vllm_vispec.config import (
    METHOD,
    SETTING_FLAGS,
    ViSpecConfig,
    drafts_with_published,
    settings_of,
    uses_vispec,
)
from vllm_vispec.draft_model import published
from vllm_vispec.draft_vocab.files import check_lm_head, resolve_draft_vocab
from vllm_vispec.heads import speculators
from vllm_vispec.heads.config import DRAFT_MODEL_ARCHITECTURE
from vllm_vispec.heads.folder import HeadInfo, inspect_head, is_vispec_head
from vllm_vispec.heads.location import locate
from vllm_vispec.heads.patch_points import SELF_SERVING
from vllm_vispec.models.head_size_checks import check_padded_heads
from vllm_vispec.scheduling.control import resolve_adaptive
from vllm_vispec.scheduling.patch_points import install
from vllm_vispec.spec_decode.checks import (
    check_keys,
    check_parallel,
    check_settings,
    check_target,
    refuse_method,
    refuse_other_method,
)
from vllm_vispec.spec_decode.low_acceptance import watch_acceptance
from vllm_vispec.spec_decode.setting_notes import describe_drafts, note_settings_without_effect
from vllm_vispec.trees import limits
from vllm_vispec.trees.limits import resolve_tree
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

CONFIG_FORMAT = "vispec"
"""Name under which vLLM knows `HeadConfigParser`."""
_FOUND: dict[str, HeadInfo] = {}
"""Drafts by the names under which vLLM asks the parser for them."""


class HeadConfigParser(ConfigParserBase):
    """Reads the configuration of a head of any checkpoint format as a plain `LlamaConfig`."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], LlamaConfig]:
        """Return the configuration as plain data and as an object."""
        info = _FOUND.get(str(model)) or inspect_head(model, revision)
        content = info.config.to_llama_config_dict()
        config = LlamaConfig(**content)
        config.architectures = [_architecture(info)]
        return content, config


@lru_cache
def register_head_parser() -> None:
    """Make vLLM read configurations in our format; vLLM logs a line, so only once one is used."""
    register_config_parser(CONFIG_FORMAT)(HeadConfigParser)


def create_engine_config(
    original: Callable[..., VllmConfig], args: EngineArgs, *call_args: Any, **kwargs: Any
) -> VllmConfig:
    """Stands for ``EngineArgs.create_engine_config``; no process but this one exists yet.

    Raises:
        ViSpecError: something that only the finished configuration tells does not go together, or
            the installed vLLM does not allow what the settings ask for.
    """
    if speculators.names_target(args.model):
        require(SELF_SERVING)
    given = args.additional_config
    try:
        vllm_config = original(args, *call_args, **kwargs)
    finally:
        # `create_speculative_config` put our settings in; the caller's arguments stay as they were.
        args.additional_config = given
    if uses_vispec(vllm_config):
        check_features(vllm_config)
        if drafts_with_published(vllm_config):
            published.check_engine(vllm_config)
        tree = ViSpecConfig.from_vllm(vllm_config).tree
        if tree is not None:
            limits.check_engine(vllm_config, tree)
            limits.note_graphs(vllm_config, tree)
        check_padded_heads(vllm_config)
        note_settings_without_effect(vllm_config)
        install(vllm_config)
        logger.info("In each step ViSpec drafts %s", describe_drafts(vllm_config))
        watch_acceptance(vllm_config.model_config.hf_config.model_type)
    return vllm_config


def create_speculative_config(
    original: Any,
    args: EngineArgs,
    target_model_config: ModelConfig,
    target_parallel_config: ParallelConfig,
) -> SpeculativeConfig | None:
    """Stands for ``EngineArgs.create_speculative_config``: accepts ViSpec heads.

    Raises:
        ViSpecError: names the setting and the remedy.
    """
    target, parallel = target_model_config, target_parallel_config
    settings = settings_of(args)
    info = _find_head(settings, target)
    if info is None:
        try:
            return original(args, target, parallel)
        except ValueError as error:
            refuse_method(settings.get("method"), error)
            raise
    config = ViSpecConfig.pop_from(settings)
    may_branch = config.tree is not None and config.tree.width > 1
    config = config.replace(
        checkpoint_format=info.checkpoint_format, tree=resolve_tree(config.tree, settings)
    )
    check_settings(settings, parallel, has_tree=config.tree is not None)
    if published.describes(info):
        config = published.check_settings(info, config, settings)
        check_parallel(info.config, parallel)
    else:
        check_target(info.config, target, parallel)
        published.refuse_images(config)
    if may_branch:
        limits.check_target(target)
        limits.check_connector(args.kv_transfer_config)
    if may_branch or config.image_share is not None:
        limits.check_cache_dtype(args.kv_cache_dtype, "tree" if may_branch else "images")
    config = config.replace(
        adaptive=resolve_adaptive(config.adaptive, settings, args, parallel, config.tree)
    )
    config = resolve_draft_vocab(config, settings, info.folder, info.config.vocab_size)
    if not info.config.is_draft_vlm:
        check_lm_head(config, target)
    settings |= {"method": "eagle"} | locate(settings["model"], info.folder)
    logger.info("ViSpec draft %s: %s", settings["model"], _description(info))
    args.additional_config = (args.additional_config or {}) | config.to_section()
    return _create_with_head(original, args, settings, target, parallel)


def _create_with_head(
    original: Any,
    args: EngineArgs,
    settings: dict[str, Any],
    target: ModelConfig,
    parallel: ParallelConfig,
) -> SpeculativeConfig:
    """Call vLLM, which reads the draft's configuration in the format that the target has."""
    register_head_parser()
    ours, reading = copy.copy(args), copy.copy(target)
    ours.speculative_config = settings
    for flag in SETTING_FLAGS:
        setattr(ours, flag, None)
    reading.config_format = CONFIG_FORMAT
    speculative: SpeculativeConfig = original(ours, reading, parallel)
    speculative.target_model_config = target
    return speculative


def _is_meant_for_us(settings: dict[str, Any]) -> bool:
    """Whether the method is ours, or stands under a misspelt key."""
    method = settings.get("method")
    return method == METHOD or (method is None and METHOD in settings.values())


def _architecture(info: HeadInfo) -> str:
    is_published = published.describes(info)
    return DRAFT_MODEL_ARCHITECTURE if is_published else info.config.architecture


def _description(info: HeadInfo) -> str:
    head, what = info.config, info.checkpoint_format
    size = f"{head.num_hidden_layers} layers of width {head.hidden_size}"
    if published.describes(info):
        return f"{what}, {size}"
    kind = f"{head.num_query_tokens} query tokens"
    if head.is_draft_vlm:
        kind = f"draft VLM, {size}"
    elif head.has_compressor:
        kind = f"compressor {head.compressor_spec}"
    return f"{what} checkpoint format, {kind}"


def _find_head(settings: dict[str, Any], target: ModelConfig) -> HeadInfo | None:
    """Return the ViSpec head the settings ask for, None if they ask for something else."""
    model = settings.get("model")
    if _is_meant_for_us(settings):
        check_keys(settings)
        if not isinstance(model, str) or not model:
            raise ViSpecError(
                'speculative config: "model" is missing; give the folder or hub id of a head or of '
                "a published model"
            )
        return _find_draft(model, settings, target)
    # Any other draft is vLLM's to judge.
    if not isinstance(model, str) or not Path(model).is_dir() or not is_vispec_head(model):
        return None
    if settings.get("method") not in (None, "eagle"):
        refuse_other_method(settings["method"], model)
        return None
    check_keys(settings)
    return inspect_head(model)


def _find_draft(model: str, settings: dict[str, Any], target: ModelConfig) -> HeadInfo:
    """Return the published model or the head of this name, and keep it for the parser."""
    revision, named = settings.get("revision"), settings.get("checkpoint_format")
    info = None if named else published.find(model, settings, target)
    info = info or inspect_head(model, revision, named)
    # vLLM reads offline what it is told by name in the hub's cache.
    for name in (locate(model, info.folder)["model"], str(info.folder)):
        _FOUND[name] = info
    return info
