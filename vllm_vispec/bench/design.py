"""Which points of a matrix are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any

from vllm_vispec.errors import ViSpecError

POINT_AXES: Mapping[str, str] = MappingProxyType(
    {
        "num_speculative_tokens": "num_speculative_tokens",
        "image_tokens": "image_tokens",
        "temperature": "temperatures",
        "concurrency": "concurrency",
    }
)
"""Fields of a point by the setting that lists their values; the last one varies fastest."""


@dataclass(frozen=True)
class Point:
    """Where in the matrix all sides are measured; see `vllm_vispec.bench.schema.CellKey`."""

    num_speculative_tokens: int
    image_tokens: int
    temperature: float
    concurrency: int


@dataclass(frozen=True)
class Design:
    """A choice of points.

    Attributes:
        summary: for the user.
        wants: whether a point is measured, from the places of its values on their axes.
    """

    name: str
    summary: str
    wants: Callable[[tuple[int, ...]], bool]


DESIGNS: Mapping[str, Design] = MappingProxyType(
    {
        design.name: design
        for design in (
            Design("full", "every combination of values", lambda places: True),
            Design(
                "star",
                "every axis by itself, the others at their first values",
                lambda places: sum(place > 0 for place in places) <= 1,
            ),
        )
    }
)


def points(design: str, axes: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Return the points of a design in order.

    Args:
        axes: values by the names of their settings, see `POINT_AXES`.

    Raises:
        ViSpecError: there is no such design.
    """
    wants = find_design(design).wants
    numbered = [list(enumerate(axes[name])) for name in POINT_AXES.values()]
    return [
        Point(*(value for _, value in chosen))
        for chosen in product(*numbered)
        if wants(tuple(place for place, _ in chosen))
    ]


def find_design(name: str) -> Design:
    """Return a design by its name.

    Raises:
        ViSpecError: there is none.
    """
    if name not in DESIGNS:
        raise ViSpecError(f"--design {name} is unknown: choose from {', '.join(DESIGNS)}")
    return DESIGNS[name]
