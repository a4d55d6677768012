"""Teaches vLLM's configuration about ViSpec heads.

Inside vLLM the method stays ``eagle``: that is what the draft is, and every feature that asks for
EAGLE keeps working.  The draft is told apart by its registered architecture alone.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.transformers_utils.config import HFConfigParser

from vllm_vispec.compat.check import require
from vllm_vispec.compat.features import check_features, uses_vispec
from vllm_vispec.compat.groups import SELF_SERVING
from vllm_vispec.compat.patching import patched
from vllm_vispec.draft_vocab.setting import check_lm_head, resolve_draft_vocab
from vllm_vispec.heads import speculators
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.folder import HeadInfo, inspect_head, is_vispec_head
from vllm_vispec.heads.location import locate
from vllm_vispec.models.head_size_checks import check_padded_heads
from vllm_vispec.spec_decode.checks import (
    check_keys,
    check_settings,
    check_target,
    refuse_method,
    refuse_other_method,
)
from vllm_vispec.spec_decode.options import METHOD, SETTING_FLAGS, EngineOptions, settings_of
from vllm_vispec.spec_decode.setting_notes import note_settings_without_effect
from vllm_vispec.trees import limits
from vllm_vispec.trees.setting import may_branch, read_tree, resolve_tree
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)


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
    vllm_config = original(args, *call_args, **kwargs)
    if uses_vispec(vllm_config):
        check_features(vllm_config)
        tree = read_tree(vllm_config)
        if tree is not None:
            limits.check_engine(vllm_config, tree)
            limits.note_graphs(vllm_config, tree)
        check_padded_heads(vllm_config)
        note_settings_without_effect(vllm_config)
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
    info = _find_head(settings)
    if info is None:
        try:
            return original(args, target, parallel)
        except ValueError as error:
            refuse_method(settings.get("method"), error)
            raise
    options = EngineOptions.pop_from(settings).with_checkpoint_format(info.checkpoint_format)
    options = resolve_tree(options, settings)
    check_settings(settings, parallel, has_tree=options.tree is not None)
    check_target(info.config, target, parallel)
    if may_branch(options):
        limits.check_target(target)
        limits.check_connector(args.kv_transfer_config)
        limits.check_cache_dtype(args.kv_cache_dtype)
    options = resolve_draft_vocab(options, settings, info.folder, info.config.vocab_size)
    if not info.config.is_draft_vlm:
        check_lm_head(options, target)
    settings |= {"method": "eagle"} | locate(settings["model"], info.folder)
    logger.info(
        "ViSpec head %s: %s checkpoint format, %s, %d draft tokens per round",
        settings["model"],
        info.checkpoint_format,
        _kind(info.config),
        settings["num_speculative_tokens"],
    )
    # The caller's arguments stay as they were given.
    ours = copy.copy(args)
    ours.speculative_config = settings
    for flag in SETTING_FLAGS:
        setattr(ours, flag, None)
    with _reading_head(settings["model"], info.config, options):
        return original(ours, target, parallel)


def _is_meant_for_us(settings: dict[str, Any]) -> bool:
    """Whether the method is ours, or stands under a misspelt key."""
    method = settings.get("method")
    return method == METHOD or (method is None and METHOD in settings.values())


def _kind(head: HeadConfig) -> str:
    if head.is_draft_vlm:
        return f"draft VLM, {head.num_hidden_layers} layers of width {head.hidden_size}"
    if head.has_compressor:
        return f"compressor {head.compressor_spec}"
    return f"{head.num_query_tokens} query tokens"


def _find_head(settings: dict[str, Any]) -> HeadInfo | None:
    """Return the ViSpec head the settings ask for, None if they ask for something else."""
    model = settings.get("model")
    if _is_meant_for_us(settings):
        check_keys(settings)
        if not isinstance(model, str) or not model:
            raise ViSpecError(
                'speculative config: "model" is missing; give the folder or hub id of a ViSpec head'
            )
        return inspect_head(model, settings.get("revision"))
    # Any other draft is vLLM's to judge.
    if not isinstance(model, str) or not Path(model).is_dir() or not is_vispec_head(model):
        return None
    if settings.get("method") not in (None, "eagle"):
        refuse_other_method(settings["method"], model)
        return None
    check_keys(settings)
    return inspect_head(model)


def _reading_head(
    head_model: str, head: HeadConfig, options: EngineOptions
) -> AbstractContextManager[None]:
    """While active, vLLM's ``hf`` config parser knows the head's configuration already."""

    def parse(
        original: Callable[..., Any], parser: Any, model: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if str(model) != head_model:
            return original(parser, model, *args, **kwargs)
        from transformers import LlamaConfig

        content = head.to_llama_config_dict() | options.to_section()
        config = LlamaConfig(**content)
        config.architectures = [head.architecture]
        return content, config

    return patched(HFConfigParser, "parse", parse)
