"""Options of the commands: most come from settings classes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import as_flag, parse

Command = Callable[..., int | None]
INTERRUPTED = 130
"""Exit code after a key press, as shells have it."""
EXAMPLE = "'{\"gpu_memory_utilization\": 0.5}'"


@contextmanager
def exit_on_error() -> Iterator[None]:
    """A user error inside becomes one line on stderr and exit code 1."""
    try:
        yield
    except ViSpecError as error:
        typer.echo(f"vispec: {error}", err=True)
        raise typer.Exit(1) from error


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


class SettingsOption(NamedTuple):
    """A field of a settings class as an option: its parameter, and what reads its value."""

    parameter: inspect.Parameter
    read: Callable[[Any], Any]


def options_of(
    *settings: type[BaseModel],
    shown: Sequence[str] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[[Command], Callable[..., None]]:
    """Give a command an option for each field of settings classes, before its own parameters.

    The command is called with the settings first, and its result is the exit code. A field's
    description is the help; in its `json_schema_extra`, "flags" gives the option other names and
    "default" another text. A field of type `tuple` takes one text, which the class reads; a
    dictionary takes a JSON object.

    Args:
        shown: fields that get an option; all if it is empty.
        defaults: other defaults than those of the classes, also of fields without an option.
    """

    def decorate(command: Command) -> Callable[..., None]:
        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        own = own[len(settings) - 1 :]
        options, fixed = [], []
        for kind in settings:
            names = [name for name in kind.model_fields if not shown or name in shown]
            options.append({n: _option(n, kind.model_fields[n], defaults) for n in names})
            hidden = kind.model_fields.keys() & defaults.keys() - {*names}
            fixed.append({name: defaults[name] for name in hidden})

        def run(**values: Any) -> None:
            with exit_on_error():
                # None stands for what the class decides itself.
                given = [
                    preset
                    | {n: o.read(v) for n, o in group.items() if (v := values.pop(n)) is not None}
                    for preset, group in zip(fixed, options, strict=True)
                ]
                made = [parse(*pair, as_flag) for pair in zip(settings, given, strict=True)]
                raise typer.Exit(command(*made, **values) or 0)

        every = [option.parameter for group in options for option in group.values()]
        every += [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
        every.sort(key=lambda one: one.default is not one.empty)
        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _option(name: str, field: FieldInfo, defaults: Mapping[str, Any]) -> SettingsOption:
    extra: Any = field.json_schema_extra or {}
    names = tuple(extra.get("flags", ()))
    flag = (*names, as_flag(name))[0]
    # The class itself refuses what is not among its values.
    choices = {get_origin(one) for one in (field.annotation, *get_args(field.annotation))}
    kind: Any = str if Literal in choices else field.annotation
    default: Any = inspect.Parameter.empty if field.is_required() else field.default
    default = defaults.get(name, default)
    read: Callable[[Any], Any] = _as_given
    if field.default_factory is not None:
        kind, default = kind | None, None
    if get_origin(kind) is tuple:
        kind, default = str, extra.get("default") or ",".join(map(_as_text, default))
    elif get_origin(kind) is dict or isinstance(default, BaseModel):
        kind, default, read = str, "{}", lambda text: json_object(flag, text)
    parameter = inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(*names, help=field.description)],
    )
    return SettingsOption(parameter, read)


def _as_given(value: Any) -> Any:
    return value


def _as_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
