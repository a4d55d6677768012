"""What commands share: lists as options, and errors as one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import typer

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


def or_exit(action: Callable[[], T]) -> T:
    """Run it; a user error becomes one line on stderr and exit code 1."""
    try:
        return action()
    except ViSpecError as error:
        typer.echo(f"vispec: {error}", err=True)
        raise typer.Exit(1) from error
