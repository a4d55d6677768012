"""A child process that does what it is asked: a JSON object a line in, one a line out."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from vllm_vispec.bench.children import STOP_S, ChildProcess
from vllm_vispec.bench.environment import server_environment
from vllm_vispec.utils.engine_start import spelled_as_option, why
from vllm_vispec.utils.errors import ViSpecError

ROOT = Path(__file__).resolve().parents[2]
REPLY_S = 3600.0


class RequestFailed(ViSpecError):
    """The child answered with an error; it can be asked again."""


class WorkerProcess:
    """A context manager around one child process.

    Args:
        name: what errors call it.
        module: what the child runs; it answers each line on stdin with one on stdout.
        environment: of the child, added to `worker_environment`.
        log_file: gets everything else that the child says.
    """

    def __init__(
        self, name: str, module: str, environment: Mapping[str, str], log_file: Path
    ) -> None:
        self.name, self.log_file = name, log_file
        self._module, self._environment = module, environment

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process; requests wait until it has done its imports."""
        self.log_file.unlink(missing_ok=True)
        environment = worker_environment() | dict(self._environment)
        self._process = ChildProcess(["-m", self._module], environment, self.log_file, piped=True)

    def request(self, content: Mapping[str, Any], seconds: float = REPLY_S) -> dict[str, Any]:
        """Send one line and return the reply.

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

    def error(self, what: str) -> ViSpecError:
        """Return the error of a process that cannot be asked any more."""
        reason = why(self.log_file.read_text(errors="replace"), spelled_as_option)
        return ViSpecError(f"the engine of {self.name} {what}: {reason} (log: {self.log_file})")

    def failed(self, reply: Mapping[str, Any]) -> RequestFailed:
        """Return the error of a request that the process answered with one."""
        return RequestFailed(f"{reply['error']} (engine of {self.name}, log {self.log_file})")

    def stop(self, seconds: float = STOP_S) -> None:
        """End the process and what it started; it gets some seconds to end by itself."""
        self._process.stop(seconds)


def worker_environment() -> dict[str, str]:
    """Return a child's environment: a server's, with this package in reach."""
    # At the end, so that another vLLM in front stays in front.
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    return server_environment() | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def serve_requests(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """In the child: answer every line on stdin; whatever else prints to stdout goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        replies.write(json.dumps(answer(json.loads(line))) + "\n")
        replies.flush()
