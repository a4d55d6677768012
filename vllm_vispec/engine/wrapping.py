"""Wrapping a method of vLLM's, once per process however often the plugin is loaded."""

from collections.abc import Callable
from functools import wraps
from typing import Any

_MARK = "_vispec_wrapped"


def wrap_once(owner: type, name: str, replacement: Callable[..., Any]) -> None:
    """Replace method ``name`` of ``owner`` by ``replacement(original, self, ...)``.

    Does nothing if the method is wrapped already.
    """
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(original, self, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)
