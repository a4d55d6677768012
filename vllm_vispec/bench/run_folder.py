"""The folder of a run: what was asked for, and every finished cell."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_vispec.bench.matrix import AXES, LATE, Repetition, different_settings
from vllm_vispec.bench.schema import CELLS_FILE, FORMAT, RUN_FILE, BenchRun, CellResult
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import write_text


class RunFolder:
    """Appends cells to a run. Use it as a context manager.

    Attributes:
        path: the folder.
        done: repetitions that are there without an error.

    Raises:
        ViSpecError: the folder belongs to other settings or another running benchmark, is damaged,
            or cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        self.path = path
        self.done: set[Repetition] = set()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._cells = (path / CELLS_FILE).open("ab")
        except OSError as error:
            raise ViSpecError(
                f"--output {path} cannot be written ({error.strerror or error}): choose another "
                "folder"
            ) from error
        try:
            fcntl.flock(self._cells, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check_run_file(settings, machine)
        except BaseException as error:
            self._cells.close()
            if not isinstance(error, BlockingIOError):
                raise
            raise ViSpecError(
                f"--output {path} is in use by another benchmark: choose another folder"
            ) from error

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        # Gives the lock back.
        self._cells.close()

    def add(self, cell: CellResult) -> None:
        """Append a measured cell, failed or not."""
        line = json.dumps(cell.to_json(), ensure_ascii=False) + "\n"
        self._cells.write(line.encode("utf-8", "replace"))
        self._cells.flush()
        if cell.error is None:
            self.done.add((cell.key, cell.repetition))

    def _check_run_file(self, settings: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        """Compare with an earlier call, note which cells are there, write what covers both."""
        file = self.path / RUN_FILE
        if file.exists():
            earlier = BenchRun.load(self.path)
            name = different_settings(earlier.settings, settings)
            if name is not None:
                raise ViSpecError(
                    f"--output {self.path} was measured with {name} "
                    f"{earlier.settings.get(name)!r}, now it is {settings[name]!r}: choose another "
                    "folder or the earlier setting"
                )
            settings, machine = _widened(earlier.settings, settings), earlier.machine
            self.done = {
                (cell.key, cell.repetition) for cell in earlier.cells if cell.error is None
            }
        content = {"format": FORMAT, "machine": dict(machine), "settings": dict(settings)}
        write_text(file, json.dumps(content, indent=2) + "\n")
        # A last line that was cut off is measured again.
        self._cells.truncate((self.path / CELLS_FILE).read_bytes().rfind(b"\n") + 1)


def _widened(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that cover what both calls asked for."""
    axes = {name: list(dict.fromkeys([*earlier[name], *now[name]])) for name in AXES}
    late = {name: now.get(name) or earlier.get(name) for name in LATE}
    repetitions = max(earlier["repetitions"], now["repetitions"])
    return {**earlier, **axes, **late, "repetitions": repetitions}
