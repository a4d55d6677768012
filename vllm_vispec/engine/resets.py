"""Tie our caches to vLLM's own resets."""

from collections.abc import Callable
from functools import wraps
from typing import Any


def clear_with(owner: Any, method_name: str, clear: Callable[[], None]) -> None:
    """Make ``owner.method_name()`` call ``clear()`` too.

    Only this one object is changed.  vLLM resets its encoder cache when weights are replaced; an
    image's adaptor rows computed from the old vision tower must go with it.
    """
    reset = getattr(owner, method_name)

    @wraps(reset)
    def reset_and_clear(*args: Any, **kwargs: Any) -> Any:
        clear()
        return reset(*args, **kwargs)

    setattr(owner, method_name, reset_and_clear)
