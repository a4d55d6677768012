"""Lists as options."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from vllm_vispec.errors import ViSpecError

T = TypeVar("T")


def split(flag: str, text: str, convert: Callable[[str], T]) -> tuple[T, ...]:
    """Return the values of a list with commas.

    Raises:
        ViSpecError: a value is not what the option takes.
    """
    try:
        return tuple(convert(item.strip()) for item in text.split(",") if item.strip())
    except ValueError as error:
        raise ViSpecError(f"{flag} {text}: give values separated by commas ({error})") from error
