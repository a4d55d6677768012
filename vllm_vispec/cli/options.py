"""Options of the commands: most come from settings classes."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from types import MappingProxyType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import typer
from pydantic import BaseModel

from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import as_flag, parse

T = TypeVar("T")
Command = Callable[..., int | None]
INTERRUPTED = 130
"""Exit code after a key press, as shells have it."""
AS_THEY_ARE = "native"
"""Stands for images of their own size in a list of numbers of image tokens."""
EXAMPLE = "'{\"gpu_memory_utilization\": 0.5}'"


@contextmanager
def exit_on_error() -> Iterator[None]:
    """A user error inside becomes one line on stderr and exit code 1."""
    try:
        yield
    except ViSpecError as error:
        typer.echo(f"vispec: {error}", err=True)
        raise typer.Exit(1) from error


def split(flag: str, text: str, convert: Callable[[str], T]) -> tuple[T, ...]:
    """Return the values of a list with commas.

    Raises:
        ViSpecError: a value is not what the option takes.
    """
    try:
        return tuple(convert(item.strip()) for item in text.split(",") if item.strip())
    except ValueError as error:
        raise ViSpecError(f"{flag} {text}: give values separated by commas ({error})") from error


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


def _read_schedule(text: str) -> Any:
    from vllm_vispec.bench.schedules import read_schedule

    return read_schedule(text)


class Form(NamedTuple):
    """How an option differs from what its field's name and type say; `read` takes flag and text."""

    names: tuple[str, ...] = ()
    read: Callable[[str, str], Any] | None = None
    default: str | None = None


FORMS = {
    "num_speculative_tokens": Form(("--num-speculative-tokens", "-k")),
    "image_tokens": Form(
        read=lambda flag, text: split(flag, text, number_of_image_tokens), default="native"
    ),
    "schedule": Form(read=lambda _, text: _read_schedule(text)),
    "serve_args": Form(("--serve",), shell_words),
    "cell_timeout_s": Form(("--cell-timeout",)),
    "engine": Form(("--engine-args",)),
}


class SettingsField(NamedTuple):
    """A field of a settings class; None as the default: the class decides itself."""

    name: str
    type: Any
    default: Any
    help: str | None
    form: Form


class SettingsOption(NamedTuple):
    """A field of a settings class as an option: its parameter, and what reads its value."""

    parameter: inspect.Parameter
    read: Callable[[Any], Any]


def options_of(
    *settings: type, shown: Sequence[str] = (), defaults: Mapping[str, Any] = MappingProxyType({})
) -> Callable[[Command], Callable[..., None]]:
    """Give a command an option for each field of settings classes, before its own parameters.

    The command is called with the settings first, and its result is the exit code. A class is a
    pydantic model whose fields have descriptions, or a dataclass with an `Attributes:` section. In
    a model's `json_schema_extra`, "flags" gives an option other names. A field of type
    `tuple[T, ...]` takes values separated by commas, a dictionary a JSON object.

    Args:
        shown: fields that get an option; all if it is empty.
        defaults: other defaults than those of the classes, also of fields without an option.
    """

    def decorate(command: Command) -> Callable[..., None]:
        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        own = own[len(settings) - 1 :]
        options, fixed = [], []
        for kind in settings:
            known = [
                one._replace(default=defaults.get(one.name, one.default)) for one in _fields(kind)
            ]
            asked = [one for one in known if not shown or one.name in shown]
            options.append({one.name: _option(one) for one in asked})
            names = {one.name for one in known if one not in asked}
            fixed.append({name: value for name, value in defaults.items() if name in names})

        def run(**values: Any) -> None:
            with exit_on_error():
                # None stands for what the class decides itself.
                given = [
                    preset
                    | {n: o.read(v) for n, o in group.items() if (v := values.pop(n)) is not None}
                    for preset, group in zip(fixed, options, strict=True)
                ]
                made = [_make(*pair) for pair in zip(settings, given, strict=True)]
                raise typer.Exit(command(*made, **values) or 0)

        every = [option.parameter for group in options for option in group.values()]
        every += [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
        every.sort(key=lambda one: one.default is not one.empty)
        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _make(settings: type, values: dict[str, Any]) -> Any:
    if issubclass(settings, BaseModel):
        return parse(settings, values, as_flag)
    return settings(**values)


def attribute_docs(settings: type) -> dict[str, str]:
    """Return the first sentence about each field under `Attributes:` in a class's docstring."""
    _, _, section = inspect.cleandoc(settings.__doc__ or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section.split("\n\n")[0], re.MULTILINE)
    texts = {name: " ".join(text.split()) for name, text in entries}
    return {name: re.split(r"(?<=\.)\s+(?=[A-Z])", text)[0] for name, text in texts.items()}


def _fields(settings: Any) -> Iterator[SettingsField]:
    empty = inspect.Parameter.empty
    if issubclass(settings, BaseModel):
        for name, item in settings.model_fields.items():
            default = empty if item.is_required() else item.default
            extra: Any = item.json_schema_extra or {}
            form = Form(tuple(extra.get("flags", ())))
            yield SettingsField(name, item.annotation, default, item.description, form)
        return
    types, docs = get_type_hints(settings), attribute_docs(settings)
    for field in fields(settings):
        kind, default = types[field.name], empty if field.default is MISSING else field.default
        if field.default_factory is not MISSING:
            kind, default = (kind if get_origin(kind) is dict else kind | None), None
        form = FORMS.get(field.name, Form())
        yield SettingsField(field.name, kind, default, docs.get(field.name), form)


def _option(field: SettingsField) -> SettingsOption:
    kind, default, form = field.type, field.default, field.form
    flag = (*form.names, as_flag(field.name))[0]
    read: Callable[[Any], Any] = _as_given
    if get_origin(kind) is tuple:
        item, default = get_args(kind)[0], form.default or ",".join(map(_as_text, default))
        convert = form.read or (lambda flag, text: split(flag, text, item))
        kind, read = str, lambda text: convert(flag, text) if text else ()
    elif get_origin(kind) is dict or isinstance(default, BaseModel):
        kind, default, read = str, "{}", lambda text: json_object(flag, text)
    elif get_origin(kind) is Literal:
        kind = str  # the class refuses other values
    parameter = inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(*form.names, help=field.help)],
    )
    return SettingsOption(parameter, read)


def _as_given(value: Any) -> Any:
    return value


def _as_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
