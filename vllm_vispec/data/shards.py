"""Conversation files of many samples: shards, and a manifest that says which they are.

In place of `answers.jsonl` there are then `answers-00000.jsonl` and so on. The manifest beside
them, `answers.jsonl.meta.json`, lists them under `shards`. Whatever takes `answers.jsonl` reads
them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ValidationError

from vllm_vispec.utils.errors import ViSpecError


class Shard(BaseModel):
    """A file of records; of one that is being written, only the name is known.

    Attributes:
        file: its name, in the manifest's folder.
        samples, bytes: how many it has.
        sha256: of its content.
    """

    file: str
    samples: int = 0
    bytes: int = 0
    sha256: str = ""


class _Manifest(BaseModel):
    shards: list[Shard] = []


def manifest_of(path: Path) -> Path:
    """Return where the manifest of a conversation file is, or would be."""
    return path.with_name(f"{path.name}.meta.json")


def listed(path: Path) -> list[Shard]:
    """Return the shards that the manifest of a conversation file lists; none without one.

    Raises:
        ViSpecError: the manifest is damaged.
    """
    manifest = manifest_of(path)
    try:
        return _Manifest.model_validate_json(manifest.read_bytes()).shards
    except OSError:
        return []
    except ValidationError as error:
        first = error.errors(include_url=False)[0]["msg"]
        raise ViSpecError(f"{manifest} is damaged ({first}): put it back as it was") from error


def exists(path: Path) -> bool:
    """Whether there is a conversation file, as one file or as shards."""
    return bool(places(path))


def places(path: Path) -> list[Path]:
    """Return where a conversation file's records are, in order, unread; none if there are none."""
    return [path] if path.is_file() else [path.with_name(one.file) for one in listed(path)]


def files_of(path: Path) -> list[Path]:
    """Return `places`, after a look at every shard: each is read whole.

    Raises:
        ViSpecError: a shard is missing, or is not what was written.
    """
    return [path] if path.is_file() else [checked(path, shard) for shard in listed(path)]


def checked(path: Path, shard: Shard) -> Path:
    """Return where a shard of a conversation file is; see `files_of`."""
    file = path.with_name(shard.file)
    try:
        with file.open("rb") as source:
            found = hashlib.file_digest(source, "sha256").hexdigest()
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
    else:
        if shard.sha256 in ("", found):
            return file
        problem = "is not what was written"
    raise ViSpecError(
        f"{file}, a shard of {path}, {problem}: put it back as it was, or delete it and run "
        "vispec regenerate as before, which answers its samples again"
    )
