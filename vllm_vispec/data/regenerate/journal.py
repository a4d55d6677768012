"""The output file as a journal: one line per finished sample, safe against being killed.

Beside ``out.jsonl`` lie ``out.jsonl.meta.json`` (settings and hash of the input: another
configuration must not mix its answers in), ``out.jsonl.rejected.jsonl`` and, at the end,
``out.jsonl.summary.json``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import write_json


def beside(output: Path, kind: str) -> Path:
    """Return the path of a file that belongs to an output file."""
    return output.with_name(f"{output.name}.{kind}")


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        ViSpecError: it cannot be read.
    """
    try:
        with path.open("rb") as source:
            return hashlib.file_digest(source, "sha256").hexdigest()
    except OSError as error:
        raise ViSpecError(f"--input {path} cannot be read: {error.strerror or error}") from error


class Journal:
    """Appends records to a file, each with one flush to the operating system.

    Use it as a context manager. ``done`` holds the ids that were there at the start.

    Raises:
        ViSpecError: the file belongs to another configuration or another running job, a line of it
            is damaged, or it cannot be written.
    """

    def __init__(self, output: Path, configuration: Mapping[str, Any]) -> None:
        self.output = output
        self.done: set[str] = set()
        self._file = -1
        self._rejected = -1
        self._size = 0
        self.written = 0
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self._open(configuration)
        except OSError as error:
            self.close()
            raise self._failure(error) from error
        except ViSpecError:
            self.close()
            raise

    def _open(self, configuration: Mapping[str, Any]) -> None:
        created = not self.output.exists() or self.output.stat().st_size == 0
        self._file = os.open(self.output, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ViSpecError(
                f"--output {self.output} is being written by another job; choose another file"
            ) from error
        _check_meta(self.output, configuration, created)
        self._load()
        rejected = beside(self.output, "rejected.jsonl")
        self._rejected = os.open(rejected, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def _load(self) -> None:
        """Read the ids that are there and drop a last line that was cut off."""
        content = self.output.read_bytes()
        self._size = content.rfind(b"\n") + 1
        for number, line in enumerate(content[: self._size].splitlines(), start=1):
            try:
                self.done.add(str(json.loads(line)["id"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ViSpecError(
                    f"--output {self.output}: line {number} is damaged; remove the line and start "
                    "again"
                ) from error
        if self._size < len(content):
            os.ftruncate(self._file, self._size)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a finished sample.

        Raises:
            ViSpecError: it cannot be written; nothing of it stays in the file.
        """
        line = _line(record)
        try:
            _write(self._file, line)
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise self._failure(error) from error
        self._size += len(line)
        self.written += 1

    def reject(self, sample_id: str, reason: str) -> None:
        """Note a sample that is left out.

        Raises:
            ViSpecError: it cannot be written.
        """
        try:
            _write(self._rejected, _line({"id": sample_id, "reason": reason}))
        except OSError as error:
            raise self._failure(error) from error

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the counts of the finished job.

        Raises:
            ViSpecError: they cannot be written.
        """
        write_json(beside(self.output, "summary.json"), summary)

    def _failure(self, error: OSError) -> ViSpecError:
        kept = len(self.done) + self.written
        return ViSpecError(
            f"--output {self.output} cannot be written ({error.strerror or error}): {kept} "
            "finished samples are kept; make room and run the same command again"
        )

    def close(self) -> None:
        """Close the files and give the lock back."""
        for handle in (self._file, self._rejected):
            if handle >= 0:
                os.close(handle)
        self._file = self._rejected = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_meta(output: Path, configuration: Mapping[str, Any], created: bool) -> None:
    """Compare the settings with those of the earlier run, or write them for a new file."""
    meta = beside(output, "meta.json")
    if created:
        write_json(meta, configuration)
        return
    try:
        earlier = json.loads(meta.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ViSpecError(
            f"--output {output} exists, but {meta.name} beside it does not say how it was made; "
            "choose another file"
        ) from error
    different = [name for name in configuration if earlier.get(name) != configuration[name]]
    if different:
        name = different[0]
        raise ViSpecError(
            f"--output {output} was made with {name} {earlier.get(name)!r}, now it is "
            f"{configuration[name]!r}; choose another file or the earlier setting"
        )


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def _write(handle: int, content: bytes) -> None:
    """Write everything; a full disk may take a part first and refuse the rest."""
    while content:
        content = content[os.write(handle, content) :]
