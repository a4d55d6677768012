"""The one exception type that users of the package are meant to see."""

from __future__ import annotations


class ViSpecError(ValueError):
    """A user error: one line that names the setting and the remedy.

    It derives from `ValueError`, so vLLM's own start-up handling (pydantic validators, the CLI)
    reports it like any other wrong setting.
    """
