"""The hub client's cache, filled by hand, as after a download."""

from __future__ import annotations

import shutil
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_snapshot_folder(cache: Path, repository: str) -> Path:
    """Return where the files of ``repository`` belong in ``cache``; the folder is not made.

    Args:
        cache: what ``HF_HUB_CACHE`` names.
    """
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots").mkdir()
    return folder / "snapshots" / COMMIT


def fill_hub_cache(cache: Path, repository: str, source: Path) -> None:
    """Put a folder's files into ``cache`` as the only commit of ``repository``."""
    shutil.copytree(source, hub_snapshot_folder(cache, repository))
