"""Which points of a matrix are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any

POINT_AXES: Mapping[str, str] = MappingProxyType(
    {
        "num_speculative_tokens": "num_speculative_tokens",
        "image_tokens": "image_tokens",
        "temperature": "temperatures",
        "concurrency": "concurrency",
    }
)
"""Fields of a point by the setting that lists their values; the last one varies fastest."""

DESIGNS: Mapping[str, Callable[[Sequence[int]], bool]] = MappingProxyType(
    {
        # Every combination of values.
        "full": lambda places: True,
        # Every axis by itself, the others at their first values.
        "star": lambda places: sum(place > 0 for place in places) <= 1,
    }
)
"""Whether a point is measured, from the places of its values on their axes."""


@dataclass(frozen=True)
class Point:
    """Where in the matrix all sides are measured; see `vllm_vispec.bench.schema.CellKey`."""

    num_speculative_tokens: int
    image_tokens: int
    temperature: float
    concurrency: int


def points(design: str, axes: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Return the points of a design in order.

    Args:
        axes: values by the names of their settings, see `POINT_AXES`.
    """
    numbered = [list(enumerate(axes[name])) for name in POINT_AXES.values()]
    return [
        Point(*(value for _, value in chosen))
        for chosen in product(*numbered)
        if DESIGNS[design]([place for place, _ in chosen])
    ]
