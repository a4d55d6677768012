"""Why an engine did not start, in one line."""

from __future__ import annotations

import re

_POINTERS = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "EngineCore encountered an issue",
)
# At the beginning of a line, or behind the prefix of vLLM's log lines.
_ERROR = re.compile(r"(?:^|[\])] )(?:\w+\.)*(\w*(?:Error|Exception): \S.*)$", re.MULTILINE)


def first_line(error: BaseException) -> str:
    """Return an error's first line; of a validation error, the line that says what is wrong."""
    found = re.search(r"Value error, (.*?)(?: \[type=|$)", str(error), re.MULTILINE)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return found.group(1) if found else lines[0]


def points_at_log(line: str) -> bool:
    """Whether an error says only that the cause stands above it in the log."""
    return any(pointer in line for pointer in _POINTERS)


def cause_in_log(text: str) -> str | None:
    """Return the last error of a log that does not point at an earlier one."""
    found = [line for line in _ERROR.findall(text) if not points_at_log(line)]
    return found[-1] if found else None
