"""Why an engine did not start, in one line."""

from __future__ import annotations

import re

from vllm_vispec.errors import ViSpecError

_POINTERS = ("Engine core initialization failed", "WorkerProc initialization failed", "EngineDead")
# At the beginning of a line, or behind the prefix of vLLM's log lines.
_ERROR = re.compile(r"(?:^|[\])] )((?:\w+\.)*\w*(?:Error|Exception)): (\S.*)$", re.MULTILINE)


def first_line(error: BaseException) -> str:
    """Return an error's first line; of a validation error, the line that says what is wrong."""
    found = re.search(r"Value error, (.*?)(?: \[type=|$)", str(error), re.MULTILINE)
    lines = str(error).strip().splitlines()
    return found.group(1) if found else lines[0] if lines else type(error).__name__


def is_refusal(error: BaseException) -> bool:
    """Whether a `ViSpecError` is at the bottom of it."""
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, ViSpecError):
            return True
        if _wraps_refusal(below):
            return True
        below = below.__cause__ or below.__context__
    return False


def _wraps_refusal(error: BaseException) -> bool:
    """Whether pydantic caught a `ViSpecError`."""
    details = getattr(error, "errors", None)
    found = details() if callable(details) else ()
    return any(isinstance((one.get("ctx") or {}).get("error"), ViSpecError) for one in found)


def points_at_log(line: str) -> bool:
    """Whether an error says only that the cause is in the log."""
    return any(pointer in line for pointer in _POINTERS)


def cause_in_log(text: str) -> str | None:
    """Return the last error of the log that is not vLLM's own pointer to an earlier one."""
    found = [match for match in _ERROR.findall(text) if not points_at_log(": ".join(match))]
    return None if not found else f"{found[-1][0].rpartition('.')[2]}: {found[-1][1]}"
