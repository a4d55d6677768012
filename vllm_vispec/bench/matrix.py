"""What is compared: the settings of a matrix and the order in which its cells are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import inf
from types import MappingProxyType
from typing import Any

from vllm_vispec.bench.schedules import Ranges, check_ranges
from vllm_vispec.bench.schema import IMAGES_AS_THEY_ARE, CellKey, Record
from vllm_vispec.bench.variants import check_variants
from vllm_vispec.utils.errors import ViSpecError

MAX_DRAFT_TOKENS = 32
AXES = ("sides", "concurrency", "num_speculative_tokens", "temperatures", "image_tokens")
"""Settings that a later call may widen; all others must stay as they were in a run's folder."""
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
LATE = ("schedule",)
"""Settings that a later call may add or leave out, but not change."""
_LIMITS = {
    "concurrency": (1, inf),
    "num_speculative_tokens": (0, MAX_DRAFT_TOKENS),
    "temperatures": (0, 10),
    "image_tokens": (IMAGES_AS_THEY_ARE, inf),
    "repetitions": (1, inf),
    "waves": (1, inf),
    "least": (1, inf),
    "warm_up": (0, inf),
}

Repetition = tuple[CellKey, int]
"""One measurement of a cell; the number counts from 0."""


@dataclass(frozen=True)
class Point:
    """Where in the matrix all variants are measured; see `vllm_vispec.bench.schema.CellKey`."""

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


@dataclass(frozen=True)
class MatrixSettings(Record):
    """The matrix and what all its cells share.

    First sentences are the options' help.

    Attributes:
        target: Target: a folder or hub id.
        dataset: How to read --data: mmspec, vispec, openai or tiny.
        head: ViSpec head: a folder or hub id. None if no variant needs it.
        eagle_head: Text-trained head for the side eagle.
        sides: Of plain, ngram, eagle, vispec_zeroed, vispec, vispec_tuned.
        concurrency: Requests in flight, e.g. 1,4,16. Each value is a cell.
        num_speculative_tokens: K, e.g. 3,5. Every value is a group of servers of its own. At 0 the
            draft is kept up and proposes nothing.
        schedule: K by batch size for vispec_tuned: JSON or a file.
        temperatures: 0 is greedy; e.g. 0,1.
        image_tokens: Image tokens of a request, e.g. native,0,256. Native is
            `IMAGES_AS_THEY_ARE`, and 0 sends no image.
        design: full: every combination; star: each axis by itself. A name in `DESIGNS`.
        repetitions: Of every cell.
        waves: Questions of a cell per request in flight. It asks at least so many.
        least: Questions of a cell, at least. Or all there are.
        warm_up: Requests before a server's first cell. They are not recorded.
        serve_args: Options of vllm serve for all sides, one string.
        ready_timeout_s: longest start of a server.
        cell_timeout_s: Longest cell, in seconds.

    Raises:
        ViSpecError: a value is unknown, missing or impossible.
    """

    target: str
    dataset: str = "openai"
    head: str | None = None
    eagle_head: str | None = None
    sides: tuple[str, ...] = ("plain", "vispec")
    concurrency: tuple[int, ...] = (1,)
    num_speculative_tokens: tuple[int, ...] = (4,)
    schedule: Ranges = ()
    temperatures: tuple[float, ...] = (0.0,)
    image_tokens: tuple[int, ...] = (IMAGES_AS_THEY_ARE,)
    design: str = "full"
    repetitions: int = 3
    waves: int = 2
    least: int = 24
    warm_up: int = 2
    serve_args: tuple[str, ...] = ()
    ready_timeout_s: float = 1800.0
    cell_timeout_s: float = 7200.0

    def __post_init__(self) -> None:
        """Check everything that needs no files."""
        for name in AXES:
            flag, values = _flag(name), getattr(self, name)
            if not values:
                raise ViSpecError(f"{flag} has no value: give at least one")
            if len(set(values)) < len(values):
                raise ViSpecError(f"{flag} names a value twice: name each once")
        for name, (low, high) in _LIMITS.items():
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if not low <= value <= high:
                    limits = f"at least {low}" if high == inf else f"{low} to {high}"
                    raise ViSpecError(f"{_flag(name)} {value}: choose {limits}")
        if self.design not in DESIGNS:
            known = ", ".join(DESIGNS)
            raise ViSpecError(f"--design {self.design} is unknown: choose from {known}")
        if self.schedule:
            check_ranges(self.schedule)
        options = {"--head": self.head, "--eagle-head": self.eagle_head}
        check_variants(self.sides, {**options, "--schedule": self.schedule})

    def num_questions(self, concurrency: int) -> int:
        """Return how many questions a cell asks, if the dataset has as many."""
        return max(self.waves * concurrency, self.least)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; how long things may take is no setting of a run."""
        content = super().to_json()
        del content["ready_timeout_s"], content["cell_timeout_s"]
        return {**content, "schedule": content["schedule"] or None}

    def groups(self) -> Iterator[tuple[int, list[Repetition]]]:
        """Yield, for every K, what is measured while its servers are up, in order.

        All variants of a point follow each other, so that a slow minute hits all of them; who goes
        first alternates from point to point and from repetition to repetition.
        """
        axes = {name: getattr(self, name) for name in POINT_AXES.values()}
        chosen = points(self.design, axes)
        for num_tokens in self.num_speculative_tokens:
            here = [point for point in chosen if point.num_speculative_tokens == num_tokens]
            yield (
                num_tokens,
                [
                    (CellKey(side, dataset=self.dataset, **asdict(point)), repetition)
                    for repetition in range(self.repetitions)
                    for number, point in enumerate(here)
                    for side in self.sides[:: -1 if (repetition + number) % 2 else 1]
                ],
            )


def different_settings(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first setting that two calls of one run must share and do not; None if none."""
    changed = [
        name
        for name in now
        if name not in (*AXES, "repetitions") and earlier.get(name) != now[name]
        if not (name in LATE and None in (earlier.get(name), now[name]))
    ]
    if now.get("design") == "star":
        # The other axes were varied around their first values.
        changed += [name for name in POINT_AXES.values() if earlier[name][0] != now[name][0]]
    return next(iter(changed), None)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
