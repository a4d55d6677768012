"""The output of a regeneration job: a line for each finished sample, in one file or in shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vllm_vispec.data.shards import Shard, checked, listed, manifest_of
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import write_json


class Journal:
    """Records of finished samples, each written whole with one flush to the system, or not at all.

    The manifest beside them says how they were made, and which shards there are. Of the one that is
    being written it has the name alone; see `vllm_vispec.data.shards`.

    Args:
        output: the file, or what its shards are named for.
        configuration: what runs that write to it share.
        limit: most samples of a shard. A larger input gets shards.

    Attributes:
        ids: samples that are finished.
    """

    def __init__(self, output: Path, configuration: Mapping[str, Any], limit: int) -> None:
        self.ids: set[str] = set()
        self._output, self._configuration, self._limit = output, configuration, limit
        self._is_new = True
        self._shards: list[Shard] = []  # none: it is one file
        self._shard = Shard(file=output.name)  # that is written to
        self._file: IO[bytes] | None = None

    def load(self) -> None:
        """Read the ids in the output, drop a last line that was cut off.

        Raises:
            ViSpecError: it was made otherwise, or a line or a shard is damaged.
        """
        shards = [] if self._output.is_file() else listed(self._output)
        present = [one for one in shards or [self._shard] if self._place(one).is_file()]
        self._is_new = not any(self._place(one).stat().st_size for one in present)
        if self._is_new:
            return
        self._check_configuration()
        self._shards = shards
        for shard in shards or [self._shard]:
            if shard in present:
                checked(self._output, shard)
            else:  # it was deleted: its samples are answered again
                self._place(shard).touch()
                shard.sha256 = ""
            self._read(shard)

    def open(self, total: int) -> None:
        """Get ready to write.

        Args:
            total: samples of the input.

        Raises:
            ViSpecError: another file has the name of a shard.
        """
        if self._shards or (self._is_new and total > self._limit):
            self._next()
            return
        self._open()
        if self._is_new:
            write_json(manifest_of(self._output), self._configuration)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record, in another shard if this one is full."""
        if self._shards and self._shard.samples >= self._limit:
            self._next()
        assert self._file is not None, "open comes first"
        try:
            self._shard.bytes += write_line(self._file, record)
        except OSError:
            self._file.truncate(self._shard.bytes)
            raise
        self._shard.samples += 1
        self.ids.add(record["id"])

    def finish(self) -> None:
        """Say in the manifest what every shard has."""
        if self._shards:
            self._write_manifest()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()

    @contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Turn what a disk refuses into one line."""
        try:
            yield
        except OSError as error:
            raise ViSpecError(
                f"--output {self._output} cannot be written ({error.strerror or error}): "
                f"{len(self.ids)} finished samples are kept; make room and run the same command "
                "again"
            ) from error

    def _place(self, shard: Shard) -> Path:
        return self._output.with_name(shard.file)

    def _open(self) -> None:
        # Unbuffered: nothing of a record that did not fit may be written later.
        self._file = self._place(self._shard).open("ab", buffering=0)

    def _next(self) -> None:
        """Go on in the first shard with room, or in a new one."""
        self.close()
        has_room = (one for one in self._shards if one.samples < self._limit)
        self._shard = next(has_room, None) or self._new_shard()
        self._shard.sha256 = ""
        self._open()
        self._write_manifest(self._shard)

    def _new_shard(self) -> Shard:
        output = self._output
        shard = Shard(file=f"{output.stem}-{len(self._shards):05}{output.suffix}")
        file = self._place(shard)
        if file.exists() and file.stat().st_size:
            raise ViSpecError(
                f"{file} would be a shard of --output {output}, and is another file: move it away, "
                "or choose another output"
            )
        self._shards.append(shard)
        return shard

    def _write_manifest(self, current: Shard | None = None) -> None:
        for one in self._shards:
            if one is not current and not one.sha256:
                with self._place(one).open("rb") as source:
                    one.sha256 = hashlib.file_digest(source, "sha256").hexdigest()
        shards = [{"file": x.file} if x is current else x.model_dump() for x in self._shards]
        write_json(manifest_of(self._output), {**self._configuration, "shards": shards})

    def _read(self, shard: Shard) -> None:
        """Read a file's ids, count its samples and bytes, and drop a last line that was cut off."""
        shard.samples = shard.bytes = 0
        with self._place(shard).open("r+b") as source:
            for number, line in enumerate(source, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self.ids.add(str(json.loads(line)["id"]))
                except (ValueError, KeyError, TypeError) as error:
                    raise ViSpecError(
                        f"--output {self._place(shard)}: line {number} is damaged; remove the line "
                        "and start again"
                    ) from error
                shard.samples += 1
                shard.bytes += len(line)
            source.truncate(shard.bytes)

    def _check_configuration(self) -> None:
        """Compare it with that of the earlier run."""
        output, manifest = self._output, manifest_of(self._output)
        try:
            earlier = json.loads(manifest.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError) as error:
            raise ViSpecError(
                f"--output {output} exists, but {manifest.name} beside it does not say how it was "
                "made; choose another file"
            ) from error
        for name, value in self._configuration.items():
            if earlier.get(name) != value:
                raise ViSpecError(
                    f"--output {output} was made with {name} {earlier.get(name)!r}, now it is "
                    f"{value!r}; choose another file or the earlier setting"
                )


def write_line(file: IO[bytes], record: Mapping[str, Any]) -> int:
    """Write a record as a line; a full disk may take a part first and refuse the rest.

    Returns:
        Its bytes.
    """
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    rest = line
    while rest:
        rest = rest[file.write(rest) :]
    return len(line)
