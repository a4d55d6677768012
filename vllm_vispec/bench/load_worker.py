"""The child process that makes loads: `vllm bench serve` with its imports done once.

It reads argument lists from stdin, one JSON list a line, does with each what `vllm ARGUMENTS`
would do, and answers with one JSON line: ``{"status": 0}``. What vLLM prints goes to stderr.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TextIO


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from vllm.entrypoints.cli import main as vllm

    _answer(answers, 0)
    for line in sys.stdin:
        _answer(answers, run(vllm.main, json.loads(line)))


def run(command_line: Callable[[], object], arguments: Sequence[str]) -> int:
    """Run a command of vLLM in this process; returns the status it would end with."""
    sys.argv = ["vllm", *arguments]
    try:
        command_line()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        # The benchmark takes all that is alive out of garbage collection, its own results too.
        gc.unfreeze()
    return 0


def _answer(answers: TextIO, status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    answers.write(json.dumps({"status": status}) + "\n")


if __name__ == "__main__":
    main()
