"""``vllm serve HEAD``: a head that names its target is served with it.

vLLM knows the speculators format and swaps target and head itself, but 0.33 refuses targets that
are folders. For a head in a local folder the swap is done here, in the same way; a head fetched
from a hub is vLLM's business and may name a hub id only, never a path of this machine.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm import envs

from vllm_vispec.heads.files import hub_snapshot
from vllm_vispec.heads.speculators import (
    SPECULATORS_TYPE,
    is_path,
    locate_target,
    serving_of_folder,
)
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

Resolved = tuple[str, str | None, dict[str, Any] | None]


def names_target(model: str) -> bool:
    """Whether a model is the local folder of a head that names its target."""
    return Path(model).is_dir() and serving_of_folder(Path(model)) is not None


def resolve_target(
    original: Callable[..., Resolved], model: str, tokenizer: str | None, *args: Any, **kwargs: Any
) -> Resolved:
    """Stands for ``maybe_override_with_speculators``; heads in local folders are ours."""
    serving = serving_of_folder(Path(model)) if Path(model).is_dir() else None
    if serving is None:
        resolved = original(model, tokenizer, *args, **kwargs)
        _check_fetched(model, resolved, kwargs.get("hf_token"))
        return resolved
    settings: dict[str, Any] = {"num_speculative_tokens": serving.num_tokens}
    settings |= kwargs.get("vllm_speculative_config") or {}
    settings |= {"method": SPECULATORS_TYPE, "model": model}
    # Offline, vLLM has put the folder of a hub id's snapshot in the id's place.
    snapshot = hub_snapshot(Path(model))
    if snapshot is not None:
        settings["model"], settings["revision"] = snapshot
        _refuse_path(serving.target, settings["model"])
    target = locate_target(serving.target, Path(model))
    _check_target(target, model, kwargs.get("hf_token"))
    logger.info("ViSpec head %s is served with its target %s", settings["model"], target)
    return target, tokenizer or target, settings


def _check_fetched(model: str, resolved: Resolved, token: Any) -> None:
    """Check the target that vLLM took from a head fetched from a hub."""
    target, _, settings = resolved
    if target == model or (settings or {}).get("method") != SPECULATORS_TYPE:
        return
    _refuse_path(target, model)
    _check_target(target, model, token)


def _refuse_path(target: str, head: str) -> None:
    if is_path(target):
        raise ViSpecError(
            f"head {head} names the folder {target!r} as its target, which a head from a hub may "
            "not: name the target yourself, with --speculative-config for the head"
        )


def _check_target(target: str, head: str, token: Any) -> None:
    """Refuse a hub id that leads nowhere, before vLLM fails on it without naming the head."""
    if Path(target).is_dir() or envs.VLLM_USE_MODELSCOPE:
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(target, "config.json", token=token)
    # The hub client raises errors of several families, and others per version.
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return  # the repository is there; what it lacks vLLM will say
        raise ViSpecError(
            f"target {target!r}, which head {head} names, is no local folder and could not be "
            f"fetched from the hub ({type(error).__name__}): check the name, your network and "
            "token, or correct speculators_config.verifier.name_or_path in the head's config.json"
        ) from error
