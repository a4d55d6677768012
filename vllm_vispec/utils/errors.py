"""The one exception type that users of the package are meant to see."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ViSpecError(ValueError):
    """A user error: one line that names the setting and the remedy.

    It derives from `ValueError`, so vLLM's own start-up handling (pydantic validators, the CLI)
    reports it like any other wrong setting.
    """


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return ``; did you mean "..."?`` with the known name nearest to ``name``, or ""."""
    found = get_close_matches(str(name), sorted(known), n=1, cutoff=0.7)
    return f'; did you mean "{found[0]}"?' if found else ""


def first_line(error: BaseException) -> str:
    """Return an error's first line, its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
