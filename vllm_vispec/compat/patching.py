"""The one way in which ViSpec changes vLLM: `patch`, on a class, a module or a single object."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

_MARK = "_vispec_patch"


def patch(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Replace ``owner.name`` by ``replacement(original, ...)``, once.

    A property is replaced by a property, and ``__new__`` of a class gets the class first.  A second
    call with the same replacement changes nothing; another replacement goes around the first.

    Args:
        owner: A class, a module or an object; of an object only that one is changed.
        name: Its function, method or property.
        replacement: What runs instead: the original first, then the call's arguments.
    """
    found: Any = getattr(owner, name)
    original: Any = found.fget if isinstance(found, property) else found
    if any(getattr(function, _MARK, None) == replacement for function in _layers(original)):
        return

    @wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(patched, _MARK, replacement)
    setattr(owner, name, property(patched) if isinstance(found, property) else patched)


@contextmanager
def patched(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """`patch` as long as the context is active."""
    original = vars(owner)[name]
    patch(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _layers(function: Any) -> Iterator[Any]:
    """Yield a function and everything it is wrapped around."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)
