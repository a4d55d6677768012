"""How the commands end on a user's error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from vllm_vispec.utils.errors import ViSpecError


@contextmanager
def exit_on_error() -> Iterator[None]:
    """A user error inside becomes one line on stderr and exit code 1."""
    try:
        yield
    except ViSpecError as error:
        typer.echo(f"vispec: {error}", err=True)
        raise typer.Exit(1) from error
