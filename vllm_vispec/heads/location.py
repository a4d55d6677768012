"""Where a head lies: a folder or a hub id, found again by every worker on its own machine."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm_vispec.utils.errors import ViSpecError

FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""What is fetched of a hub's repository."""
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def is_hub_id(name: str) -> bool:
    """Whether a name is written like one of a hub and no folder of this name is there."""
    return bool(_HUB_ID.match(name)) and not Path(name).is_dir()


def resolve_head(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """Return the local folder of a head, downloaded if it is a hub id.

    Weights as safetensors and texts are fetched: pickles never reach this machine.

    Raises:
        ViSpecError: the folder does not exist, or the hub cannot deliver the repository.
    """
    name = str(path_or_hub_id)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.is_file():
        raise ViSpecError(
            f"draft {str(path)!r} is a file: give the folder that holds config.json and the "
            "safetensors"
        )
    if not is_hub_id(name):
        raise ViSpecError(
            f"draft folder {name!r} does not exist: give an existing folder, or a hub id like "
            "'org/name'"
        )
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=[*FILES])
    # The hub client raises errors of several families (its own, its HTTP library's), which differ
    # between versions; all mean the same to the user.
    except Exception as error:
        # Not its repr: workers get a subclass of str.
        at = f" at revision '{revision}'" if revision else ""
        raise ViSpecError(
            f"draft {name!r}{at} is no local folder and could not be fetched from the hub "
            f"({type(error).__name__}): check the name, your network and token, or download it "
            "yourself and give the folder"
        ) from error
    return Path(folder)


def hub_snapshot(folder: Path) -> tuple[str, str] | None:
    """Return hub id and commit if the folder is a snapshot in the hub's cache, else None.

    Another machine has no such folder; hub id and commit mean the same everywhere.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = folder.absolute()
    owner, snapshots = folder.parent.parent, folder.parent.name
    if owner.parent != Path(HF_HUB_CACHE).absolute() or snapshots != "snapshots":
        return None
    return owner.name.removeprefix("models--").replace("--", "/"), folder.name


def locate(model: str, folder: Path) -> dict[str, str]:
    """Return the settings `model` and `revision` that mean the same head on any machine.

    Args:
        model: as the user gave it. A folder stays a folder, which every machine must have; a hub
            id is pinned to the commit that was checked.
        folder: what it was resolved to here.
    """
    if Path(model).expanduser().is_dir():
        return {"model": str(folder.absolute())}
    # A folder of the hub's cache is named after its commit.
    return {"model": model, "revision": folder.name}


def head_folder(draft_model_config: Any) -> Path:
    """Return the head's folder on this machine, downloaded if this machine does not have it yet.

    Args:
        draft_model_config: vLLM's `ModelConfig` of the draft.

    Raises:
        ViSpecError: it is not here and cannot be fetched; names the machine.
    """
    return _head_folder(draft_model_config.model, draft_model_config.revision)


@lru_cache
def _head_folder(model: str, revision: str | None) -> Path:
    try:
        return resolve_head(model, revision)
    except ViSpecError as error:
        raise ViSpecError(f"worker on {platform.node()}: {error}") from error


@contextmanager
def loaded_from_folder(draft_model_config: Any) -> Iterator[Path]:
    """Let vLLM load the draft's weights from `head_folder`, which this yields.

    Outside, the configuration names the head as on every other machine.

    Raises:
        ViSpecError: the device has too little memory for it; names the draft.
    """
    from torch import OutOfMemoryError

    named, folder = draft_model_config.model, head_folder(draft_model_config)
    draft_model_config.model = str(folder)
    try:
        yield folder
    except OutOfMemoryError as error:
        raise ViSpecError(
            f"draft {named} does not fit into the memory that the target left "
            f"({str(error).splitlines()[0]}): use a smaller or quantised draft, or more ranks"
        ) from error
    finally:
        draft_model_config.model = named
