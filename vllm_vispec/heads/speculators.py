"""A head that names its target in the speculators format's fields, so that it serves itself.

vLLM reads these fields from config.json of whatever it is told to serve. The layout follows the
public format (github.com/vllm-project/speculators, `SpeculatorsConfig`); its code is not used.

`vllm serve HEAD` then serves the target with the head. vLLM swaps them itself, but 0.33 refuses
targets that are folders. So `resolve_target` swaps them for a head in a local folder, in the same
way. A head fetched from a hub is left to vLLM and may name a hub id only, never a path of this
machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.folder import CONFIG, read_json
from vllm_vispec.heads.location import hub_snapshot
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

SPECULATORS_TYPE = "vispec"

Resolved = tuple[str, str | None, dict[str, Any] | None]
"""Model to serve, its tokenizer, speculative config."""


@dataclass(frozen=True)
class Serving:
    """What a head says about being served.

    Attributes:
        target: as written: a hub id, an absolute path, or a path relative to the head's folder
            that begins with "./" or "../".
        num_tokens: draft tokens per step.
    """

    target: str
    num_tokens: int = 4


def speculators_fields(head: HeadConfig, serving: Serving, destination: Path) -> dict[str, Any]:
    """Return the additional entries of config.json.

    Args:
        serving: its target is a hub id or a folder. A relative folder is stored relative to
            `destination`, so that both may move together; an absolute one stays absolute.
        destination: where the head will lie.

    Raises:
        ViSpecError: the target is written like a path, but there is no such folder.
    """
    layer = head.to_llama_config_dict()
    proposal = {"proposal_type": "greedy", "speculative_tokens": serving.num_tokens}
    return {
        "speculators_model_type": SPECULATORS_TYPE,
        "speculators_config": {
            "algorithm": SPECULATORS_TYPE,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "verifier": {
                "name_or_path": _stored_target(serving.target, destination),
                "architectures": _architectures(serving.target),
            },
        },
        "transformer_layer_config": {
            name: value for name, value in layer.items() if name not in ("architectures", "vispec")
        },
    }


def read_serving(config: Mapping[str, Any]) -> Serving | None:
    """Return what config.json says about being served, None if it says nothing or is not ours.

    Raises:
        ViSpecError: the fields are there, but not what they must be.
    """
    if config.get("speculators_model_type") != SPECULATORS_TYPE:
        return None
    try:
        section = config["speculators_config"]
        target = section["verifier"]["name_or_path"]
        num_tokens = section["proposal_methods"][0]["speculative_tokens"]
    except (KeyError, IndexError, TypeError) as error:
        raise ViSpecError(
            "the head's config.json has an incomplete speculators_config (verifier.name_or_path "
            "and proposal_methods[0].speculative_tokens are needed): export the head again"
        ) from error
    if not isinstance(target, str) or not target:
        raise ViSpecError(
            f"speculators_config.verifier.name_or_path of the head is {target!r}: name its target "
            "there, a hub id or a folder"
        )
    return Serving(target, num_tokens)


def serving_of_folder(folder: Path) -> Serving | None:
    """`read_serving` of a local head; None where there is no readable config.json."""
    try:
        config = read_json(folder / CONFIG)
    except ViSpecError:
        return None
    return read_serving(config)


def names_target(model: str) -> bool:
    """Whether a model is the local folder of a head that names its target."""
    return Path(model).is_dir() and serving_of_folder(Path(model)) is not None


def locate_target(target: str, head: Path) -> str:
    """Return the target of the local head `head` as vLLM takes it.

    Raises:
        ViSpecError: it is written as a path and there is no such folder.
    """
    if not _is_path(target):
        return target
    path = Path(os.path.normpath(head.absolute() / Path(target).expanduser()))
    if not (path / CONFIG).is_file():
        raise ViSpecError(
            f"the target of head {head} is {target!r}, but there is no model in {path}: correct "
            "speculators_config.verifier.name_or_path in its config.json, or name the target: "
            f'vllm serve TARGET --speculative-config \'{{"method":"vispec","model":"{head}",...}}\''
        )
    return str(path)


def resolve_target(
    original: Callable[..., Resolved], model: str, tokenizer: str | None, *args: Any, **kwargs: Any
) -> Resolved:
    """Replace `maybe_override_with_speculators`: heads in local folders are ours."""
    token = kwargs.get("hf_token")
    serving = serving_of_folder(Path(model)) if Path(model).is_dir() else None
    if serving is None:
        resolved = target, _, settings = original(model, tokenizer, *args, **kwargs)
        if target != model and (settings or {}).get("method") == SPECULATORS_TYPE:
            _refuse_path(target, model)
            _check_target(target, model, token)
        return resolved
    settings = {"num_speculative_tokens": serving.num_tokens}
    settings |= kwargs.get("vllm_speculative_config") or {}
    settings |= {"method": SPECULATORS_TYPE, "model": model}
    # Offline, vLLM has replaced a hub id by the folder of its snapshot.
    snapshot = hub_snapshot(Path(model))
    if snapshot is not None:
        settings["model"], settings["revision"] = snapshot
        _refuse_path(serving.target, settings["model"])
    target = locate_target(serving.target, Path(model))
    _check_target(target, model, token)
    logger.info("ViSpec head %s is served with its target %s", settings["model"], target)
    return target, tokenizer or target, settings


def _is_path(target: str) -> bool:
    """Whether a target is written as a path (else it is a hub id)."""
    return target in (".", "..") or target.startswith(("./", "../", "/", "~"))


def _refuse_path(target: str, head: str) -> None:
    if _is_path(target):
        raise ViSpecError(
            f"head {head} names the folder {target!r} as its target, which a head from a hub may "
            "not: name the target yourself, with --speculative-config for the head"
        )


def _check_target(target: str, head: str, token: Any) -> None:
    """Refuse a hub id that leads nowhere, before vLLM fails on it without naming the head."""
    from vllm import envs

    if Path(target).is_dir() or envs.VLLM_USE_MODELSCOPE:
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(target, CONFIG, token=token)
    # The hub client raises errors of several families, and others per version.
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return  # the repository is there; vLLM will say what it lacks
        raise ViSpecError(
            f"target {target!r}, which head {head} names, is no local folder and could not be "
            f"fetched from the hub ({type(error).__name__}): check the name, your network and "
            "token, or correct speculators_config.verifier.name_or_path in the head's config.json"
        ) from error


def _stored_target(target: str, destination: Path) -> str:
    path = Path(target).expanduser()
    if not path.is_dir():
        if _is_path(target):
            raise ViSpecError(
                f"target {target!r} is no folder: give the target's folder or its hub id"
            )
        return target
    if path.is_absolute():
        return str(path)
    relative = os.path.relpath(path.absolute(), destination.absolute())
    return relative if relative.startswith("..") else f"./{relative}"


def _architectures(target: str) -> list[str]:
    """Return the target's architectures, as far as they can be read without a network."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(target).expanduser()
    file = folder / CONFIG if folder.is_dir() else try_to_load_from_cache(target, CONFIG)
    config = read_json(Path(file)) if isinstance(file, str | Path) else {}
    return [str(name) for name in config.get("architectures") or ()]
