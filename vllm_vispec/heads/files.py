"""Finding a head's folder and reading config.json and safetensors headers. Loads no tensor."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vllm_vispec.draft_vocab.files import DRAFT_VOCAB
from vllm_vispec.utils.errors import ViSpecError

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies and what its header says."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def resolve_head(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """Local folder of a head, downloaded if it is a hub id.

    Only `*.json` and `*.safetensors` are fetched: pickles never reach this machine.

    Raises:
        ViSpecError: the folder does not exist, or the hub cannot deliver the repository.
    """
    name = str(path_or_hub_id)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.is_file():
        raise ViSpecError(
            f"head {str(path)!r} is a file: give the folder that holds config.json and the "
            "safetensors"
        )
    if not _HUB_ID.match(name) or "/" not in name:
        raise ViSpecError(
            f"head folder {name!r} does not exist: give an existing folder, or a hub id like "
            "'org/name'"
        )
    return _download(name, revision)


def hub_snapshot(folder: Path) -> tuple[str, str] | None:
    """Hub id and commit of a repository whose snapshot in the hub's cache the folder is, or None.

    The folder means nothing on another machine, these two do.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = folder.absolute()
    owner, snapshots = folder.parent.parent, folder.parent.name
    if owner.parent != Path(HF_HUB_CACHE).absolute() or snapshots != "snapshots":
        return None
    return owner.name.removeprefix("models--").replace("--", "/"), folder.name


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=["*.json", "*.safetensors"]
        )
    # The hub client raises its own errors (OSError and ValueError families), those of its HTTP
    # library, and different ones per version; all mean the same to the user.
    except Exception as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ViSpecError(
            f"head {repo_id!r}{at} is no local folder and could not be fetched from the hub "
            f"({type(error).__name__}): check the name, your network and token, or download it "
            "yourself and give the folder"
        ) from error
    return Path(folder)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ViSpecError: the file is missing, unreadable or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ViSpecError(
            f"{path.name} is missing in {path.parent}: give the folder of a ViSpec head"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ViSpecError(
            f"{path} cannot be read as JSON ({error}): download or export the head again"
        ) from error
    if not isinstance(content, dict):
        raise ViSpecError(f"{path} holds no JSON object: download or export the head again")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if there is one.

    Raises:
        ViSpecError: there are none, only pickles, or the index names files that are missing.
    """
    index = folder / _INDEX
    if index.is_file():
        return _indexed_files(index)
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    found = sorted(one for one in folder.glob("*.safetensors") if one.name != DRAFT_VOCAB)
    if found:
        return found
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise ViSpecError(
            f"{folder} holds only pickle weights ({short_list(pickles)}), which can run code and "
            "are never loaded: convert them to safetensors where you trust them"
        )
    raise ViSpecError(
        f"no *.safetensors in {folder}: download the head again, and if its author ships only "
        "pickles (*.bin, *.pt), convert them to safetensors"
    )


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ViSpecError(f"{index} has no weight_map: download or export the head again")
    names = sorted({str(name) for name in weight_map.values()})
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ViSpecError(
            f"{index.parent} lacks {short_list(missing)}, which {index.name} names: download the "
            "head again"
        )
    return [index.parent / name for name in names]


def read_entries(files: list[Path]) -> dict[str, TensorEntry]:
    """Name -> entry of every tensor in the files, from their headers.

    Raises:
        ViSpecError: a file is truncated or corrupt, a name occurs twice, or a dtype is no float.
    """
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in _read_header(file).items():
            if name in entries:
                raise ViSpecError(
                    f"tensor {name!r} is in both {entries[name].file.name} and {file.name}: "
                    "keep one set of weights in the head's folder"
                )
            if entry.dtype not in _FLOATS:
                raise ViSpecError(
                    f"tensor {name!r} of the head has dtype {entry.dtype}: only unquantised "
                    "heads (float32, float16, bfloat16) are supported"
                )
            entries[name] = entry
    return entries


def _read_header(file: Path) -> dict[str, TensorEntry]:
    try:
        with safe_open(str(file), framework="numpy") as weights:
            return {name: _entry(weights, file, name) for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ViSpecError(
            f"{file} is truncated or corrupt ({error}): download or export the head again"
        ) from error


def _entry(weights: Any, file: Path, name: str) -> TensorEntry:
    part = weights.get_slice(name)
    return TensorEntry(file, tuple(part.get_shape()), str(part.get_dtype()))


def short_list(names: list[str], limit: int = 6) -> str:
    """At most `limit` names, then a count."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
