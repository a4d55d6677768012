"""Files and folders that appear whole or not at all, with one clear error when they cannot."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from typing import IO, TYPE_CHECKING, Any

from safetensors import SafetensorError

from vllm_vispec.utils.errors import ViSpecError

if TYPE_CHECKING:
    from torch import Tensor

ASIDE = ".writing-"


def nearest(path: Path) -> Path:
    """Return a path, or the nearest above it that exists: it is on the disk that will be used."""
    absolute = path.absolute()
    return next(one for one in (absolute, *absolute.parents) if one.exists())


def lock(file: IO[Any], refusal: str) -> None:
    """Let this process alone have an open file, until it is closed.

    Raises:
        ViSpecError: another has it; with the text ``refusal``.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ViSpecError(refusal) from error


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; moved there at the end, removed if anything fails.

    Raises:
        ViSpecError: the disk is full or the folder cannot be written.
    """
    # No process number: containers that share a cache's folder have the same ones.
    aside = path.with_name(f"{ASIDE}{token_hex(4)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ViSpecError(
            f"{path} cannot be written ({reason}): free space or make the folder writable, then "
            "run the same command again; what was saved before is intact"
        ) from error
    finally:
        _remove(aside)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; see `writing`."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; see `writing`."""
    with writing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors atomically; see `writing`."""
    from safetensors.torch import save_file

    with writing(path) as aside:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, aside)


def read_json(path: Path) -> Any:
    """Read a JSON file that a run wrote.

    Raises:
        ViSpecError: it is missing or damaged.
    """
    with _reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file that a run wrote, on the CPU.

    Raises:
        ViSpecError: it is missing or damaged.
    """
    from safetensors.torch import load_file

    with _reading(path):
        return load_file(path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ViSpecError(
            f"{path} cannot be read ({error}): delete {path.parent} and run again"
        ) from error


def sweep(folder: Path, idle_s: float = 0.0) -> None:
    """Remove what a killed process left behind half written.

    Args:
        idle_s: of a folder that several jobs share: how long nobody has written to it, in seconds.
    """
    now = time.time()
    for leftover in folder.glob(f"{ASIDE}*"):
        with suppress(OSError):  # gone meanwhile
            if now - leftover.stat().st_mtime >= idle_s:
                _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        # It may lie in a folder that is none; whatever failed before is the error to report.
        with suppress(OSError):
            path.unlink()
