"""Run a function of the test suite in a fresh Python process, with JSON in and JSON lines out.

Engines of different kinds (V1, V2 under Triton's interpreter, the 0.33 overlay) need different
environments before the first import, hence a process each.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
LOG_TAIL = 4000


class ChildError(AssertionError):
    """The child failed; carries what it had returned before and the end of its log."""

    def __init__(self, reason: str, items: list[Any], log: str) -> None:
        super().__init__(f"{reason}\n--- end of the child's log ---\n{log[-LOG_TAIL:]}")
        self.items = items
        self.log = log


def run_in_subprocess(
    target: str,
    kwargs: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 900,
    log_file: Path | None = None,
) -> list[Any]:
    """Call ``module:function`` with ``kwargs`` in a child process and return what it yields.

    The function returns or yields JSON data: a generator gives one item per ``yield`` (kept even if
    the child dies later), anything else a list of one item. ``env`` is added to this process's
    environment; its ``PYTHONPATH`` goes in front of the repository's. ``log_file`` gets what the
    process printed.

    Raises:
        ChildError: the function raised, the process died or the time was up.
    """
    with tempfile.TemporaryDirectory(prefix="vispec-child-") as name:
        result, log = Path(name) / "result.jsonl", Path(name) / "log.txt"
        command = [sys.executable, "-m", "tests.support.child", target, str(result)]
        reason = _run(
            command, json.dumps(dict(kwargs or {})), _environment(env or {}), log, timeout
        )
        items = _read(result)
        text = log.read_text(errors="replace")
        if log_file is not None:
            log_file.write_text(text)
    if reason or not items or items[-1] != {"done": True}:
        raise ChildError(f"{target}: {reason or 'ended early'}", _values(items), text)
    return _values(items)


def _run(command: list[str], stdin: str, env: dict[str, str], log: Path, timeout: float) -> str:
    """Run ``command`` and return why it failed ("" if it did not)."""
    with log.open("w") as sink:
        try:
            done = subprocess.run(
                command,
                input=stdin,
                text=True,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=REPOSITORY,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"no result after {timeout:.0f} s"
    return "" if done.returncode == 0 else f"exit status {done.returncode}"


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    merged = dict(os.environ) | dict(extra)
    paths = [extra.get("PYTHONPATH", ""), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    merged["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return merged


def _read(path: Path) -> list[Any]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def _values(items: list[Any]) -> list[Any]:
    return [item["value"] for item in items if "value" in item]


def _call(target: str, kwargs: Mapping[str, Any]) -> Iterable[Any]:
    module, _, name = target.partition(":")
    value = getattr(importlib.import_module(module), name)(**kwargs)
    return value if hasattr(value, "__next__") else [value]


def main() -> None:
    """Entry point of the child: ``module:function RESULT_FILE``, keyword arguments on stdin."""
    from tests.support.engine import prepare_process

    prepare_process()
    target, result = sys.argv[1], Path(sys.argv[2])
    kwargs = json.load(sys.stdin)
    with result.open("w") as sink:
        for value in _call(target, kwargs):
            print(json.dumps({"value": value}), file=sink, flush=True)
        print(json.dumps({"done": True}), file=sink, flush=True)


if __name__ == "__main__":
    main()
