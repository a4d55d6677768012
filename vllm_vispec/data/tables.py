"""Data sets as tables, parquet files and those of the Hugging Face hub, as conversation files.

Everything else here reads JSON lines and images by their path. So a table is written out once,
images that lie in its cells as files beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_vispec.utils.errors import ViSpecError, first_line
from vllm_vispec.utils.files import read_json, write_json, writing

RECORDS = "records.jsonl"
# A path drops one of the two slashes.
_HUB = re.compile(r"^hf:/{1,2}(?:datasets/)?(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>\S+))?$")
_ROWS_AT_ONCE = 64
_IMAGE_KEYS = {"bytes", "path"}


def is_table(source: str | Path) -> bool:
    """Whether a data set is a parquet file or written like hf://org/name or hf://org/name:split."""
    return str(source).endswith(".parquet") or _HUB.match(str(source)) is not None


def write_out(source: str | Path, folder: Path) -> Path:
    """Write a table's rows as JSON lines, unless that was done before.

    A row has the fields of a conversation file's record. A cell with an image becomes its path; in
    OpenAI style, parts of type image without a path take the row's `images` in turn.

    Args:
        source: see `is_table`; of a data set on the hub the split "train", unless it names another.
        folder: for the file and its images.

    Returns:
        The file.

    Raises:
        ViSpecError: the package `datasets` is missing, the table cannot be read, or the folder
            holds another one.
    """
    file, note = folder / RECORDS, folder / "source.json"
    made_of: dict[str, Any] = {"source": str(source)}
    with suppress(OSError):  # a data set of the hub
        made_of["bytes"] = Path(source).stat().st_size
        made_of["changed"] = Path(source).stat().st_mtime
    if file.is_file():
        before = read_json(note)
        if before | made_of != before:
            raise ViSpecError(
                f"{folder} holds another data set than {source}, or as it was before: delete it"
            )
        return file
    rows = _rows(str(source))
    with writing(folder) as aside:
        (aside / "images").mkdir(parents=True)
        with (aside / RECORDS).open("w", encoding="utf-8") as sink:
            for number, row in enumerate(rows):
                images = _Images(aside, number)
                record = _fill(images.replace(row))
                sink.write(json.dumps({"id": f"row{number}"} | record, default=str) + "\n")
        write_json(aside / note.name, made_of)
    return file


def _rows(source: str) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ViSpecError(
            f"data set {source} needs the package datasets: pip install 'vllm-vispec[data]'"
        ) from error
    hub = _HUB.match(source)
    # Files that are missing, a hub that is not reached, tables that are damaged: types differ.
    try:
        if hub:
            found = datasets.load_dataset(hub["name"], split=hub["split"] or "train")
        else:
            found = datasets.load_dataset("parquet", data_files=source, split="train")
        # As arrow, images stay the bytes that they are.
        for table in found.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
            yield from table.to_pylist()
    except Exception as error:
        raise ViSpecError(
            f"data set {source} cannot be read ({first_line(error)}): give a parquet file, or "
            "hf://org/name:split with access to the hub"
        ) from error


class _Images:
    """Image files of a row."""

    def __init__(self, folder: Path, row: int) -> None:
        self._folder, self._row, self._count = folder, row, 0

    def replace(self, value: Any) -> Any:
        """Return a value with paths for images, without the fields that have none."""
        if isinstance(value, dict):
            if value.keys() >= _IMAGE_KEYS and isinstance(value["bytes"] or b"", bytes):
                return self._write(value["bytes"], value["path"])
            return {k: self.replace(v) for k, v in value.items() if v is not None}
        return [self.replace(one) for one in value] if isinstance(value, list) else value

    def _write(self, content: bytes | None, path: str | None) -> str | None:
        if content is None:
            return path
        name = f"images/{self._row}-{self._count}{Path(path or '').suffix or '.png'}"
        self._count += 1
        (self._folder / name).write_bytes(content)
        return name


def _fill(record: dict[str, Any]) -> dict[str, Any]:
    """Give image parts of messages the row's images."""
    messages, images = record.get("messages"), record.get("images")
    if isinstance(messages, list) and isinstance(images, list):
        left = iter(images)
        parts = [p for m in messages if isinstance(m.get("content"), list) for p in m["content"]]
        for part in parts:
            if part.get("type") == "image" and not part.keys() & {"image", "path"}:
                part["image"] = next(left, "")
    return record
