"""One side of a comparison: an engine in a child process that answers when asked."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from examples.demo.job import Answer, Job
from examples.pair import ENVIRONMENT
from vllm_vispec.utils.engine_start import why

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 900.0
REPLY_SECONDS = 600.0


class SideError(RuntimeError):
    """The engine did not start, died, or took too long."""


class Side:
    """A context manager around one engine process.

    Args:
        name: What errors call it.
        job: The engine's settings.
        log_file: Receives everything the process prints.
        threads: OpenMP threads of the engine.
        worker: Module that is run; it must end in ``serve(...)`` of the worker.
    """

    def __init__(
        self,
        name: str,
        job: Job,
        log_file: Path,
        threads: int = 1,
        worker: str = "examples.demo.worker",
    ) -> None:
        self.name, self.job, self.log_file = name, job, log_file
        self.threads, self.worker = threads, worker
        self.start_seconds = 0.0

    def __enter__(self) -> Side:
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.worker],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=REPOSITORY,
                env=self._environment(),
            )
        try:
            self.start_seconds = self.request(self.job.to_json(), START_SECONDS)["ready"]
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def answer(self, sample: int) -> Answer:
        """Have one sample answered."""
        return Answer.from_json(self.request({"sample": sample}))

    def request(self, content: dict[str, Any], timeout: float = REPLY_SECONDS) -> dict[str, Any]:
        """Send one line and wait for its reply.

        Raises:
            SideError: The process ended or did not reply in time.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(content) + "\n")
            stdin.flush()
        # One reply per request, so nothing can wait unseen in the text layer's buffer.
        if not select.select([stdout], [], [], timeout)[0]:
            raise self._error(f"did not reply within {timeout:.0f} s")
        line = stdout.readline()
        if not line:
            raise self._error("ended early")
        return dict(json.loads(line))

    def _error(self, what: str) -> SideError:
        log = self.log_file.read_text(errors="replace")
        reason = why(log, lambda name, value: f"{name}={value}")
        return SideError(f"the {self.name} engine {what}: {reason} (log: {self.log_file})")

    def _environment(self) -> dict[str, str]:
        engine_in_process = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONPATH": os.pathsep.join(
                path for path in (os.environ.get("PYTHONPATH"), str(REPOSITORY)) if path
            ),
        }
        return ENVIRONMENT | dict(os.environ) | engine_in_process

    def _stop(self) -> None:
        process = self._process
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
