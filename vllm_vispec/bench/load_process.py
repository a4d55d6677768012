"""Making loads, one after the other, with the imports of `vllm bench serve` paid once."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from vllm_vispec.bench.children import end_with_parent
from vllm_vispec.bench.environment import server_environment
from vllm_vispec.bench.load import LoadError, LoadJob, LoadResult, read_result

WORKER = ("-m", "vllm_vispec.bench.load_worker")
READY_S = 900.0
ERROR_TAIL = 1500
_CHUNK = 1 << 16


class LoadGenerator:
    """Runs `vllm bench serve` in a child process that stays. Use it as a context manager.

    The child starts with `prepare` or the first job. One that takes too long is killed, and the
    next job has a new one.

    Args:
        worker: what follows the interpreter to start the child.
    """

    def __init__(self, worker: Sequence[str] = WORKER) -> None:
        self._worker = tuple(worker)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._is_ready = False

    def __enter__(self) -> LoadGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, job: LoadJob) -> LoadResult:
        """Make the load and read what came of it.

        Raises:
            LoadError: the generator fails, takes too long or says nothing.
        """
        job.result.unlink(missing_ok=True)
        job.result.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._wait_until_ready()
            begin = self._log_size()
            status = self._run(job)
        except BaseException:
            # Also on a signal: what it is still doing would be load on the next cell.
            self.close()
            raise
        if status != 0:
            raise LoadError(f"vllm bench serve ended with status {status}: {self._tail(begin)}")
        return read_result(job.result, job.samples)

    def prepare(self) -> None:
        """Start the child, if none is there, without waiting for it."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self._log = tempfile.TemporaryFile(prefix="vispec-load-")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, *self._worker],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=server_environment(),
            # A key press reaches only us.
            start_new_session=True,
            preexec_fn=end_with_parent,
        )

    def close(self) -> None:
        """End the child and what it started."""
        process, self._process, self._is_ready = self._process, None, False
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _wait_until_ready(self) -> None:
        self.prepare()
        if self._is_ready:
            return
        if self._status(READY_S, "its start") != 0:
            raise LoadError(f"vllm bench serve does not start: {self._tail(0)}")
        self._is_ready = True

    def _run(self, job: LoadJob) -> int:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job.arguments()).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise LoadError(f"vllm bench serve is gone: {self._tail(0)}") from error
        return self._status(job.timeout_s, "the load")

    def _status(self, seconds: float, what: str) -> int:
        """Wait for the child's next line; one that ended has its own status."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        deadline, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            left = max(deadline - time.monotonic(), 0.0)
            if not select.select([process.stdout], [], [], left)[0]:
                raise LoadError(f"{what} took longer than {seconds:.0f} s")
            piece = os.read(process.stdout.fileno(), _CHUNK)
            if not piece:
                return process.wait()
            line += piece
        return int(json.loads(line)["status"])

    def _log_size(self) -> int:
        assert self._log is not None
        return os.fstat(self._log.fileno()).st_size

    def _tail(self, begin: int) -> str:
        """Return the end of what the child said since then."""
        assert self._log is not None
        size = self._log_size()
        begin = max(begin, size - ERROR_TAIL)
        text = os.pread(self._log.fileno(), size - begin, begin)
        return text.decode(errors="replace").strip()


def run_load(job: LoadJob) -> LoadResult:
    """Make one load, with a child process of its own.

    Raises:
        LoadError: the generator fails, takes too long or says nothing.
    """
    with LoadGenerator() as generator:
        return generator(job)
