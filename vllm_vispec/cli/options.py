"""What options of several commands share, and options that come from a settings class."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from vllm_vispec.cli.errors import exit_on_error
from vllm_vispec.errors import ViSpecError

S = TypeVar("S")
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


SHORT = {"num_speculative_tokens": "-k"}
"""Fields whose option has a short name, too."""


def options_of(settings: type[S]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of a settings class, before its own parameters.

    The command is called with the settings first. An option's help is the first sentence about its
    field under `Attributes:` in the class's docstring, its default is the field's, and a field of
    type `tuple[T, ...]` takes values separated by commas.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        helps, types = attribute_docs(settings), get_type_hints(settings)
        options = [_option(field, types[field.name], helps) for field in fields(settings)]  # type: ignore[arg-type]

        def run(**values: Any) -> None:
            with exit_on_error():
                given = {one.name: values.pop(one.name) for one in options}
                command(settings(**_read(given, types)), **values)

        every = [*options, *(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own)]
        parameters = sorted(every, key=lambda one: one.default is not one.empty)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def attribute_docs(settings: type) -> dict[str, str]:
    """Return the first sentence about each field under `Attributes:` in a class's docstring."""
    section = inspect.cleandoc(settings.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    texts = {name: " ".join(text.split()) for name, text in entries}
    return {name: re.split(r"(?<=\.)\s+(?=[A-Z])", text)[0] for name, text in texts.items()}


def _option(field: Field[Any], kind: Any, helps: dict[str, str]) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    if get_origin(kind) is tuple:
        kind, default = str, ",".join(map(str, default))
    names = ["--" + field.name.replace("_", "-"), *SHORT.get(field.name, "").split()]
    option = typer.Option(*names, help=helps[field.name])
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option],
    )


def _read(given: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    return {
        name: split("--" + name.replace("_", "-"), value, get_args(types[name])[0])
        if get_origin(types[name]) is tuple
        else value
        for name, value in given.items()
    }
