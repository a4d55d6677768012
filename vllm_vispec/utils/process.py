"""Child processes that do not outlive their parent, and those that answer requests."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from vllm_vispec.utils.engine_start import spelled_as_option, why
from vllm_vispec.utils.errors import ViSpecError

ROOT = Path(__file__).resolve().parents[2]
STOP_S, REPLY_S = 30.0, 3600.0
_PR_SET_PDEATHSIG = 1
# Looked up here: between fork and exec as little as possible may happen.
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None


class ChildProcess(subprocess.Popen[bytes]):
    """A Python process in a session of its own; its output goes to a file.

    It ends with its parent, except where the parent is killed with SIGKILL and the system is not
    Linux.

    Args:
        arguments: what follows the interpreter.
        environment: the whole of it.
        log_file: is appended to.
        piped: stdin and stdout are pipes, and only stderr goes to the file.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log_file: Path,
        *,
        piped: bool = False,
    ) -> None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as log:
            super().__init__(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE if piped else None,
                stdout=subprocess.PIPE if piped else log,
                stderr=log,
                env=environment,
                # A key press reaches only the parent, which ends its children in order.
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def stop(self, seconds: float = STOP_S) -> None:
        """End it and what it started: ask first, kill after some seconds."""
        if self.stdin is None:
            self.terminate()
        else:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(seconds)
        # The group outlives its leader when a process of an engine hangs.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(STOP_S)
        if self.stdout is not None:
            self.stdout.close()


def _end_with_parent() -> None:
    """In the child before it starts: ask for SIGTERM when the parent dies."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


class RequestFailed(ViSpecError):
    """The child answered with an error; it can be asked again."""


class WorkerProcess:
    """A child that answers each JSON line on its stdin with one on stdout; a context manager.

    Args:
        name: what errors call it.
        module: what the child runs; see `serve_requests`.
        environment: the whole of it; this package is put within reach.
        log_file: gets everything else that the child prints.
    """

    def __init__(
        self, name: str, module: str, environment: Mapping[str, str], log_file: Path
    ) -> None:
        self.name, self.log_file = name, log_file
        # At the end, so that another vLLM in front stays in front.
        path = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), str(ROOT))))
        self._module, self._environment = module, {**environment, "PYTHONPATH": path}

    def __enter__(self) -> Self:
        """Start the process; requests wait until it has done its imports."""
        self.log_file.unlink(missing_ok=True)
        self._process = ChildProcess(
            ["-m", self._module], self._environment, self.log_file, piped=True
        )
        try:
            self.begin()
        except BaseException:
            self.stop()
            raise
        return self

    def begin(self) -> None:
        """Ask what comes first; if it fails, the process is ended and `with` raises."""

    def __exit__(self, *_: object) -> None:
        self.stop()

    def request(self, content: Mapping[str, Any], seconds: float = REPLY_S) -> dict[str, Any]:
        """Send one request and return the reply.

        Raises:
            RequestFailed: the reply is an error.
            ViSpecError: the process ended or did not reply in time.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(content).encode() + b"\n")
            stdin.flush()
        # One reply per request, so nothing can wait unseen in the stream's buffer.
        if not select.select([stdout], [], [], seconds)[0]:
            raise self.error(f"did not reply within {seconds:.0f} s")
        line = stdout.readline()
        if not line:
            raise self.error("ended")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self.failed(reply)
        return reply

    def log(self) -> str:
        """Return what the process printed."""
        return self.log_file.read_text(errors="replace")

    def error(self, what: str) -> ViSpecError:
        """Return the error of a process that cannot be asked any more."""
        reason = why(self.log(), spelled_as_option)
        return ViSpecError(f"the engine of {self.name} {what}: {reason} (log: {self.log_file})")

    def failed(self, reply: Mapping[str, Any]) -> RequestFailed:
        """Return the error of a request that the process answered with one."""
        return RequestFailed(f"{reply['error']} (engine of {self.name}, log {self.log_file})")

    def stop(self, seconds: float = STOP_S) -> None:
        """End the process and what it started; it gets some seconds to end by itself."""
        self._process.stop(seconds)


def serve_requests(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """In the child: answer every line on stdin; whatever else prints to stdout goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line))) + "\n")
        replies.flush()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM end the block as SIGINT does, so that child processes are stopped."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)
