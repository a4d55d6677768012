"""Settings classes: pydantic models whose errors are one line that names the setting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import UnionType
from typing import Any, Self, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from vllm_vispec.utils.errors import ViSpecError, did_you_mean

M = TypeVar("M", bound=BaseModel)
Spelling = Callable[[str], str]
"""A setting's dotted name -> how the user writes it."""


def _split(given: Any) -> Any:
    is_text = isinstance(given, str)
    return [item.strip() for item in given.split(",") if item.strip()] if is_text else given


CommaSeparated = BeforeValidator(_split)
"""Lets a list be given as one text."""

# Start of a pydantic error type -> what the setting takes.
_WANTED: Mapping[str, str] = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a number",
    "bool": "true or false",
    "string": "a text",
    "path": "a path",
    "tuple": "a list",
    "list": "a list",
    "dict": "name: value pairs",
    "mapping": "name: value pairs",
    "too": "at least one value",  # too_short
}
_LIMITS: Mapping[str, tuple[str, str]] = {
    "greater_than_equal": ("ge", "at least"),
    "less_than_equal": ("le", "at most"),
    "greater_than": ("gt", "more than"),
    "less_than": ("lt", "less than"),
}


class Settings(BaseModel):
    """Base of settings classes: frozen, and only names that are declared.

    Make them with `parse`, which turns pydantic's errors into ours.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)


class CommandSettings(Settings):
    """Base of settings that are options of a command: `cli.options.options_of`."""

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values, checked.

        Raises:
            ViSpecError: See `parse`.
        """
        return parse(type(self), dict(self) | changes, as_flag)


def as_flag(name: str) -> str:
    """Spell a setting as an option of a command."""
    return f"--{name.replace('_', '-')}"


def parse(model: type[M], values: Mapping[str, Any], spelling: Spelling = str, see: str = "") -> M:
    """Return the settings, checked.

    Args:
        values: nested as the model is.
        spelling: how the user writes a setting.
        see: where all settings are listed; for names that resemble none.

    Raises:
        ViSpecError: one line about the first error, with the nearest known name or what to give.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ViSpecError(_describe(error, model, spelling, see)) from error


def iter_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted name, field) of every setting, nested ones in place of their section."""
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is not None:
            yield from iter_fields(section, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a field with settings below it, which may be left out; else None."""
    kinds = get_args(field.annotation) if isinstance(field.annotation, UnionType) else ()
    for kind in (field.annotation, *kinds):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def choices(field: FieldInfo) -> tuple[str, ...]:
    """Return the values of a `Literal` field; none for others."""
    found = get_args(field.annotation)
    return found if found and all(isinstance(one, str) for one in found) else ()


def _describe(error: ValidationError, model: type[BaseModel], spelling: Spelling, see: str) -> str:
    first = error.errors(include_url=False)[0]
    # The place in a list says less than the value, which is named, too.
    name, kind = ".".join(one for one in first["loc"] if isinstance(one, str)), first["type"]
    context = first.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])  # worded by a validator of the model
    if kind == "extra_forbidden":
        what = f"setting {name!r}" if spelling is str else spelling(name)
        return f"{what} is unknown{_nearest(name, model) or (see and f'; see {see}')}"
    if kind == "missing":
        return f"{spelling(name)} is missing: set it"
    if kind in _LIMITS:
        key, words = _LIMITS[kind]
        wanted = f"give {words} {context[key]:g}"
    elif kind == "model_type":
        wanted = f"give name: value pairs of {', '.join(_settings_below(name, model))}"
    elif kind == "literal_error":
        wanted = "use one of " + context["expected"].replace(" or ", ", ").replace("'", "")
    else:
        wanted = "give " + _WANTED.get(kind.split("_")[0], first["msg"])
    return f"{spelling(name)} is {first['input']!r}: {wanted}"


def _settings_below(section: str, model: type[BaseModel]) -> list[str]:
    """Return the last names of a section's settings; none if there is no such section."""
    known = (full.rpartition(".") for full, _ in iter_fields(model))
    return [tail for head, _, tail in known if head == section]


def _nearest(name: str, model: type[BaseModel]) -> str:
    """A hint at a known name; a name without its section, or of another one, counts too."""
    known = [full for full, _ in iter_fields(model)]
    section, _, tail = name.rpartition(".")
    siblings = _settings_below(section, model) if section else []
    if siblings and not did_you_mean(tail, siblings):
        return f"; the settings there are {', '.join(siblings)}"
    hint = did_you_mean(name, {*known, *model.model_fields})
    if hint:
        return hint
    tails = {full.rpartition(".")[2]: full for full in known}
    found = did_you_mean(name.rpartition(".")[2], tails)
    return next((f'; did you mean "{tails[one]}"?' for one in tails if f'"{one}"' in found), "")
