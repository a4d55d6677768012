"""Records of JSON files that are no conversation files, turned into conversations one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_vispec.data.images import image_file
from vllm_vispec.data.types import Conversation, Part, Rejected, Turn
from vllm_vispec.utils.errors import ViSpecError

ID_FIELDS = ("id", "question_id")
Json = Mapping[str, Any]
Convert = Callable[[Json, str], Conversation | None]

CHAT_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
"""Vicuna's system prompt, which the evaluations of ViSpec and MMSpec put before every question."""


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, undecoded line) of a JSONL file, empty lines left out.

    Raises:
        ViSpecError: the file cannot be read.
    """
    try:
        with path.open("rb") as source:
            for number, line in enumerate(source, start=1):
                if line.strip():
                    yield f"line{number}", line
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ViSpecError: the file cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, "not JSON") from error


def convert_each(
    records: Iterable[tuple[str, Any]],
    convert: Convert,
    id_fields: Sequence[str] = ID_FIELDS,
) -> Iterator[Conversation | Rejected]:
    """Yield the conversation of every record, or why it is left out.

    Args:
        records: (name, undecoded JSON or parsed record).
        convert: gets a record and its id. It raises ValueError with the reason if the record
            cannot be used, and returns None if it is no part of the dataset (another split, say).
        id_fields: where a record's id may be; without one its name serves.
    """
    seen: set[str] = set()
    for name, record in records:
        item = _convert(record, name, convert, id_fields)
        if item is None:
            continue
        if item.sample_id in seen:
            item = Rejected(f"{item.sample_id} ({name})", "a record with this id was there before")
        seen.add(item.sample_id)
        yield item


def _convert(
    record: Any, name: str, convert: Convert, id_fields: Sequence[str]
) -> Conversation | Rejected | None:
    try:
        if isinstance(record, bytes):
            record = _parse(record)
        if not isinstance(record, Mapping):
            raise ValueError("not a JSON object")
        name = str(first_of(record, id_fields) or name)
        return convert(record, name)
    except ValueError as error:
        return Rejected(name, str(error))


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error


def first_of(record: Json, names: Sequence[str]) -> Any:
    """Return the first field that is there and not empty, None without one."""
    return next((record[name] for name in names if record.get(name) not in (None, "", [])), None)


def find_image(path: str, folders: Sequence[Path]) -> str:
    """Return the absolute path of an image that lies in one of the folders.

    Raises:
        BadImage: it lies in none.
    """
    found = next((folder / path for folder in folders if (folder / path).is_file()), None)
    return str((found or image_file(path, folders[0])).resolve())


def text_turn(role: str, text: str) -> Turn:
    """A turn without images."""
    return Turn(role, (Part(text=text),))


def _unreadable(path: Path, reason: str) -> ViSpecError:
    return ViSpecError(f"dataset file {path} cannot be read: {reason}")
