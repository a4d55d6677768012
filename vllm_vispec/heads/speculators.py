"""The speculators format's fields: a head that names its target, so that it serves itself.

vLLM reads them from config.json of whatever it is told to serve. The layout follows the public
format (github.com/vllm-project/speculators, `SpeculatorsConfig`); its code is not used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.files import read_json
from vllm_vispec.heads.formats.base import RawConfig
from vllm_vispec.utils.errors import ViSpecError

SPECULATORS_TYPE = "vispec"
_NOT_OF_A_LAYER = ("architectures", "vispec")


@dataclass(frozen=True)
class Serving:
    """What a head says about being served.

    Attributes:
        target: as written: a hub id, an absolute path, or a path relative to the head's folder
            that begins with "./" or "../".
        num_tokens: draft tokens per round.
    """

    target: str
    num_tokens: int


def speculators_fields(
    head: HeadConfig, target: str, destination: Path, num_tokens: int
) -> dict[str, Any]:
    """The additional entries of config.json.

    Args:
        target: hub id or folder. A relative folder is stored relative to `destination`, so that
            both may move together; an absolute one stays absolute.
        destination: where the head will lie.
        num_tokens: draft tokens per round, unless the user says otherwise.

    Raises:
        ViSpecError: the target is written like a path, but there is no such folder.
    """
    layer = head.to_llama_config_dict()
    proposal = {"proposal_type": "greedy", "speculative_tokens": num_tokens}
    return {
        "speculators_model_type": SPECULATORS_TYPE,
        "speculators_config": {
            "algorithm": SPECULATORS_TYPE,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "verifier": {
                "name_or_path": _stored_target(target, destination),
                "architectures": _architectures(target),
            },
        },
        "transformer_layer_config": {
            name: value for name, value in layer.items() if name not in _NOT_OF_A_LAYER
        },
    }


def read_serving(config: RawConfig) -> Serving | None:
    """What config.json says about being served, None if it is silent or of another kind.

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
        config = read_json(folder / "config.json")
    except ViSpecError:
        return None
    return read_serving(config)


def is_path(target: str) -> bool:
    """Whether a target is written as a path (else it is a hub id)."""
    return target in (".", "..") or target.startswith(("./", "../", "/", "~"))


def locate_target(target: str, head: Path) -> str:
    """The target of the local head `head` as vLLM takes it.

    Raises:
        ViSpecError: it is written as a path and there is no such folder.
    """
    if not is_path(target):
        return target
    path = Path(os.path.normpath(head.absolute() / Path(target).expanduser()))
    if not (path / "config.json").is_file():
        raise ViSpecError(
            f"the target of head {head} is {target!r}, but there is no model in {path}: correct "
            "speculators_config.verifier.name_or_path in its config.json, or name the target: "
            f'vllm serve TARGET --speculative-config \'{{"method":"vispec","model":"{head}",...}}\''
        )
    return str(path)


def _stored_target(target: str, destination: Path) -> str:
    path = Path(target).expanduser()
    if not path.is_dir():
        if is_path(target):
            raise ViSpecError(
                f"target {target!r} is no folder: give the target's folder or its hub id"
            )
        return target
    if path.is_absolute():
        return str(path)
    relative = os.path.relpath(path.absolute(), destination.absolute())
    return relative if relative.startswith("..") else f"./{relative}"


def _architectures(target: str) -> list[str]:
    """The target's architectures, as far as they can be read without a network."""
    config: Mapping[str, Any] = {}
    folder = Path(target).expanduser()
    if folder.is_dir():
        config = read_json(folder / "config.json")
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(target, "config.json")
        if isinstance(cached, str):
            config = read_json(Path(cached))
    return [str(name) for name in config.get("architectures") or ()]
