"""The output file as a journal: one line per finished sample, safe against being killed.

Beside ``out.jsonl`` lie ``out.jsonl.meta.json`` (settings and hash of the input: another
configuration must not mix its answers in), ``out.jsonl.rejected.jsonl`` and, at the end,
``out.jsonl.summary.json``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
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
        self.output, self.done = output, set[str]()
        self._size = self._written = 0
        with self._naming_failures(), ExitStack() as stack:
            output.parent.mkdir(parents=True, exist_ok=True)
            created = not output.exists() or output.stat().st_size == 0
            # Unbuffered: nothing of a record that did not fit may be written later.
            self._file = stack.enter_context(output.open("ab", buffering=0))
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ViSpecError(
                    f"--output {output} is being written by another job; choose another file"
                ) from error
            _check_meta(output, configuration, created)
            self._load()
            rejected = beside(output, "rejected.jsonl")
            self._rejected = stack.enter_context(rejected.open("wb", buffering=0))
            self._open = stack.pop_all()

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
        self._file.truncate(self._size)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a finished sample.

        Raises:
            ViSpecError: it cannot be written; nothing of it stays in the file.
        """
        with self._naming_failures():
            try:
                self._size += _write(self._file, record)
            except OSError:
                self._file.truncate(self._size)
                raise
        self._written += 1

    def reject(self, sample_id: str, reason: str) -> None:
        """Note a sample that is left out.

        Raises:
            ViSpecError: it cannot be written.
        """
        with self._naming_failures():
            _write(self._rejected, {"id": sample_id, "reason": reason})

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the counts of the finished job.

        Raises:
            ViSpecError: they cannot be written.
        """
        write_json(beside(self.output, "summary.json"), summary)

    @contextmanager
    def _naming_failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = len(self.done) + self._written
            raise ViSpecError(
                f"--output {self.output} cannot be written ({error.strerror or error}): {kept} "
                "finished samples are kept; make room and run the same command again"
            ) from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *details: object) -> None:
        self._open.close()  # gives the lock back


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


def _write(file: Any, record: Mapping[str, Any]) -> int:
    """Write a line; a full disk may take a part first and refuse the rest."""
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    rest = line
    while rest:
        rest = rest[file.write(rest) :]
    return len(line)
