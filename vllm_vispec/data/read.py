"""Reading conversation files: JSON lines or one JSON array, records of any format in `FORMATS`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_vispec.data.formats import to_conversation
from vllm_vispec.data.images import BadImage, image_file, image_folder
from vllm_vispec.data.types import Conversation, Rejected
from vllm_vispec.utils.errors import ViSpecError

__all__ = ["Rejected", "read_conversations"]


def read_conversations(
    path: Path, image_root: Path | None = None, *, check_images: bool = True
) -> Iterator[Conversation | Rejected]:
    """Yield, for every record of the file, its conversation or why it is left out.

    Image paths stay as written; they start from ``image_root`` or the file's folder, and a record
    whose image is not there is rejected (unless ``check_images`` is off). A record without ``id``
    is called after its line. A second record with an id that was there before is rejected.

    Raises:
        ViSpecError: the file cannot be read or is one broken JSON array.
    """
    folder = image_folder(path, image_root) if check_images else None
    seen: set[str] = set()
    for number, text_or_record in _records(path):
        item = _read_one(text_or_record, number, folder)
        if item.sample_id in seen:
            item = Rejected(
                f"{item.sample_id}#line{number}", f"id {item.sample_id} was there before"
            )
        seen.add(item.sample_id)
        yield item


def _read_one(text_or_record: Any, number: int, folder: Path | None) -> Conversation | Rejected:
    sample_id = f"line{number}"
    try:
        record = _parse(text_or_record) if isinstance(text_or_record, bytes) else text_or_record
        given = record.get("id") if isinstance(record, dict) else None
        sample_id = sample_id if given is None else str(given)
        conversation = to_conversation(record, sample_id)
        for image in conversation.images if folder is not None else ():
            image_file(image, folder)
    except BadImage as error:
        return Rejected(sample_id, str(error))
    except ValueError as error:
        return Rejected(sample_id, f"line {number}: {error}")
    return conversation


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError("not JSON") from error


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number or position, undecoded line or parsed record) from 1 on."""
    try:
        with path.open("rb") as source:
            start = source.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            source.seek(0)
            if start == b"[":
                yield from enumerate(_array(path, source.read()), start=1)
                return
            for number, line in enumerate(source, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ViSpecError(f"input {path} cannot be read: {error.strerror or error}") from error


def _array(path: Path, content: bytes) -> list[Any]:
    try:
        return list(_parse(content))
    except ValueError as error:
        raise ViSpecError(f"input {path} is no JSON array ({error}); use one record a line") from (
            error
        )
