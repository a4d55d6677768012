"""Where a head lies: said at configuration time, found again by every worker on its own machine."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm_vispec.heads import resolve_head
from vllm_vispec.utils.errors import ViSpecError


def locate(model: str, folder: Path) -> dict[str, str]:
    """Return the settings ``model`` and ``revision`` that mean the same head on any machine.

    Args:
        model: As the user gave it. A folder stays a folder, which every machine must have; a hub
            id is pinned to the commit that was checked.
        folder: What it was resolved to here.
    """
    if Path(model).expanduser().is_dir():
        return {"model": str(folder.absolute())}
    # A folder of the hub's cache is named after its commit.
    return {"model": model, "revision": folder.name}


def head_folder(draft_model_config: Any) -> Path:
    """Return the head's folder on this machine, downloaded if this machine does not have it yet.

    Args:
        draft_model_config: vLLM's ``ModelConfig`` of the draft.

    Raises:
        ViSpecError: It is not here and cannot be fetched; names the machine.
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
    """While active, vLLM loads the draft's weights from `head_folder`, which it yields.

    Outside, the configuration names the head as on every other machine.
    """
    named, folder = draft_model_config.model, head_folder(draft_model_config)
    draft_model_config.model = str(folder)
    try:
        yield folder
    finally:
        draft_model_config.model = named
