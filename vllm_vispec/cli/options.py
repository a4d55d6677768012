"""What options of several commands share."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any, TypeVar

from vllm_vispec.utils.errors import ViSpecError

T = TypeVar("T")
INTERRUPTED = 130
"""Exit code after a key press, as shells have it."""
AS_THEY_ARE = "native"
"""Stands for images of their own size in a list of numbers of image tokens."""


def split(flag: str, text: str, convert: Callable[[str], T]) -> tuple[T, ...]:
    """Return the values of a list with commas.

    Raises:
        ViSpecError: a value is not what the option takes.
    """
    try:
        return tuple(convert(item.strip()) for item in text.split(",") if item.strip())
    except ValueError as error:
        raise ViSpecError(f"{flag} {text}: give values separated by commas ({error})") from error


EXAMPLE = "'{\"gpu_memory_utilization\": 0.5}'"


def json_object(flag: str, text: str) -> dict[str, Any]:
    """Return the value of an option that takes a JSON object.

    Raises:
        ViSpecError: it is none.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ViSpecError(f"{flag} is not JSON ({error}); write e.g. {EXAMPLE}") from error
    if not isinstance(found, dict):
        raise ViSpecError(f"{flag} is not a JSON object; write e.g. {EXAMPLE}")
    return found


def number_of_image_tokens(text: str) -> int:
    """Return a number, or what stands for images as they are."""
    from vllm_vispec.bench.schema import IMAGES_AS_THEY_ARE

    return IMAGES_AS_THEY_ARE if text == AS_THEY_ARE else int(text)


def shell_words(flag: str, text: str) -> tuple[str, ...]:
    """Return the words of an option that takes a command line.

    Raises:
        ViSpecError: a quote is not closed.
    """
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ViSpecError(f"{flag} {text}: {error}; close the quote") from error
