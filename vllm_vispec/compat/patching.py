"""Wrapping a function of vLLM's, once per process however often the plugin is loaded."""

from collections.abc import Callable
from functools import wraps
from typing import Any

_MARK = "_vispec_wrapped"


def wrap_once(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Replace ``owner.name`` by ``replacement(original, ...)``; its arguments follow.

    Args:
        owner: A class or a module.
        name: Its method or function; nothing happens if that is wrapped already.
        replacement: What runs instead, given the original first.
    """
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)


def wrap_object(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Replace the method ``name`` of this one object by ``replacement(original, ...)``."""
    original = getattr(owner, name)

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(owner, name, wrapped)
