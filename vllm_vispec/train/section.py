"""A section of the recipe: documented fields that are checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields
from types import MappingProxyType
from typing import Any

from vllm_vispec.utils.errors import ViSpecError


def setting(
    default: Any,
    meaning: str,
    source: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A documented field; `choices`, `low` and `high` (inclusive) are checked."""
    metadata = {
        "meaning": meaning,
        "source": source,
        "choices": choices,
        "low": low,
        "high": high,
    }
    if isinstance(default, Mapping):
        return field(default_factory=lambda: MappingProxyType(dict(default)), metadata=metadata)
    return field(default=default, metadata=metadata)


class Section:
    """Base of the sections: checks every field against its metadata."""

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            _check(f"{section_name(type(self))}.{item.name}", getattr(self, item.name), item)


def section_name(section: type) -> str:
    """Name of a section in the recipe: `DataConfig` -> "data"."""
    return section.__name__.removesuffix("Config").removesuffix("Settings").lower()


def _check(name: str, value: Any, item: Any) -> None:
    choices, low, high = (item.metadata[key] for key in ("choices", "low", "high"))
    if choices and value not in choices:
        raise ViSpecError(f"{name} is {value!r}: use one of {', '.join(choices)}")
    if low is not None and not value >= low:
        raise ViSpecError(f"{name} is {value!r}: give at least {low}")
    if high is not None and not value <= high:
        raise ViSpecError(f"{name} is {value!r}: give at most {high}")
