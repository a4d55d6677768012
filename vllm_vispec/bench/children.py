"""A child process that must not outlive the one that started it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

STOP_S = 30.0
_PR_SET_PDEATHSIG = 1
# Looked up here: between fork and exec as little as possible may happen.
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None


class ChildProcess:
    """A Python process in a session of its own, with everything it says in a file.

    Args:
        arguments: what follows the interpreter.
        environment: the whole of it.
        log_file: is appended to.
        piped: stdin and stdout are pipes, and only the rest goes to the file.
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
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE if piped else None,
                stdout=subprocess.PIPE if piped else log,
                stderr=log,
                env=environment,
                # A key press reaches only us; we end the children in order.
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self.pid = self._process.pid
        self.stdin, self.stdout = self._process.stdin, self._process.stdout

    @property
    def alive(self) -> bool:
        """Whether it is still there."""
        return self._process.poll() is None

    def stop(self, seconds: float = STOP_S) -> None:
        """End it and what it started: politely, and after some seconds not."""
        if self.stdin is None:
            self._process.terminate()
        else:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        # The group outlives its leader when a process of an engine hangs.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(STOP_S)
        if self.stdout is not None:
            self.stdout.close()


def _end_with_parent() -> None:
    """In the child before it starts: ask for SIGTERM when its parent dies, of SIGKILL too.

    Only Linux can. Elsewhere a run that is killed with SIGKILL leaves its children behind.
    """
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
