"""Child processes that call functions of the test suite.

Engines of different kinds (V1, V2 under Triton's interpreter, vLLM 0.33) need other environments
before the first import, hence a process each. Arguments and results are pickled, so a function of a
test module can be passed as it is.
"""

from __future__ import annotations

import os
import pickle
import pkgutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
LOG_TAIL = 4000


class ChildError(AssertionError):
    """The call failed; ``log`` is what the child had printed and the error's traceback."""

    def __init__(self, reason: str, log: str) -> None:
        super().__init__(f"{reason}\n--- end of the child's log ---\n{log[-LOG_TAIL:]}")
        self.log = log


class Child:
    """A process that calls one function after another.

    Args:
        env: Added to this process's environment; its ``PYTHONPATH`` goes before the repository's.
        timeout: Most seconds a call may take.
    """

    def __init__(self, env: Mapping[str, str] | None = None, timeout: float = 1500) -> None:
        self._timeout = timeout
        self._connection, there = Pipe()
        self._log = tempfile.NamedTemporaryFile("w+", prefix="vispec-child-", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.child", str(there.fileno())],
            env=_environment(env or {}),
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=[there.fileno()],
        )
        there.close()

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return ``function(*args, **kwargs)``, called in the child.

        Raises:
            ChildError: It raised, the process died or the time was up; the process is gone then.
        """
        deadline = time.monotonic() + self._timeout
        try:
            _send(self._connection, (function, args, kwargs))
            while not self._connection.poll(0.5):
                if self._process.poll() is not None:
                    raise EOFError
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no result after {self._timeout:.0f} s")
            value, error = _receive(self._connection)
        except (EOFError, OSError) as failure:
            value, error = None, str(failure)
            if not isinstance(failure, TimeoutError):
                error = f"the process ended: exit status {self._process.wait(10)}"
        if not error:
            return value
        log = f"{self.log()}\n{error}"
        self.close()
        raise ChildError(f"{function.__name__}: {error.strip().splitlines()[-1]}", log)

    def log(self) -> str:
        """Return what the process has printed."""
        return Path(self._log.name).read_text(errors="replace")

    @property
    def is_open(self) -> bool:
        """Whether it takes calls."""
        return not self._connection.closed

    def close(self) -> None:
        """End the process; it stops its engines first if it can."""
        if not self.is_open:
            return
        self._connection.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)


def _send(connection: Connection, value: Any) -> None:
    # Not its own method, with which torch shares memory instead of copying.
    connection.send_bytes(pickle.dumps(value))


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())  # noqa: S301  # from our own process


def run_in_subprocess(
    target: str,
    kwargs: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 900,
) -> list[Any]:
    """Call ``module:function`` in a process of its own; return what it yields or returns."""
    child = Child(env, timeout)
    try:
        return list(child.call(_collect, target, dict(kwargs or {})))
    finally:
        child.close()


def _collect(target: str, kwargs: dict[str, Any]) -> list[Any]:
    value = pkgutil.resolve_name(target)(**kwargs)
    return list(value) if hasattr(value, "__next__") else [value]


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    merged = dict(os.environ) | dict(extra)
    paths = [extra.get("PYTHONPATH", ""), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    merged["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return merged


def main() -> None:
    """Answer calls until the parent closes its end."""
    from tests.support import engine

    engine.prepare_process()
    connection = Connection(int(sys.argv[1]))
    while True:
        try:
            function, args, kwargs = _receive(connection)
        except EOFError:
            break
        except Exception:
            _send(connection, (None, traceback.format_exc()))
            continue
        try:
            answer = function(*args, **kwargs), ""
        except Exception:
            answer = None, traceback.format_exc()
        _send(connection, answer)
    engine.end_process()


if __name__ == "__main__":
    main()
