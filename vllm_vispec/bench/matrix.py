"""What is compared: the settings of a matrix and the order in which its cells are measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_vispec.bench.design import POINT_AXES, find_design, points
from vllm_vispec.bench.schedules import Ranges, check_ranges
from vllm_vispec.bench.schema import IMAGES_AS_THEY_ARE, CellKey
from vllm_vispec.bench.sides import check_sides
from vllm_vispec.errors import ViSpecError

MAX_DRAFT_TOKENS = 32
AXES = ("sides", "concurrency", "num_speculative_tokens", "temperatures", "image_tokens")
"""Settings that a later call may widen; all others must stay as they were in a run's folder."""
LATE = ("schedule",)
"""Settings that a later call may add or leave out, but not change."""


@dataclass(frozen=True)
class MatrixSettings:
    """The matrix and what all its cells share.

    First sentences are the options' help.

    Attributes:
        target: Target: a folder or hub id.
        dataset: How to read --data: mmspec, vispec, openai or tiny.
        head: ViSpec head: a folder or hub id. None if no side needs it.
        eagle_head: Text-trained head for the side eagle.
        sides: Of plain, ngram, eagle, vispec_zeroed, vispec, vispec_tuned.
        concurrency: Requests in flight, e.g. 1,4,16. Each value is a cell.
        num_speculative_tokens: K, e.g. 3,5. Every value is a group of servers of its own. At 0 the
            draft is kept up and proposes nothing.
        schedule: K by batch size for vispec_tuned: JSON or a file.
        temperatures: 0 is greedy; e.g. 0,1.
        image_tokens: Image tokens of a request, e.g. native,0,256. Native is
            `IMAGES_AS_THEY_ARE`, and 0 sends no image.
        design: full: every combination; star: each axis by itself. A name in
            `vllm_vispec.bench.design.DESIGNS`.
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
            _check_axis(name, getattr(self, name))
        _check_range("--concurrency", self.concurrency, 1, None)
        _check_range("--num-speculative-tokens", self.num_speculative_tokens, 0, MAX_DRAFT_TOKENS)
        _check_range("--temperatures", self.temperatures, 0, 10)
        _check_range("--image-tokens", self.image_tokens, IMAGES_AS_THEY_ARE, None)
        find_design(self.design)
        _check_range("--repetitions", (self.repetitions,), 1, None)
        _check_range("--waves", (self.waves,), 1, None)
        _check_range("--least", (self.least,), 1, None)
        _check_range("--warm-up", (self.warm_up,), 0, None)
        if self.schedule:
            check_ranges(self.schedule)
        options = {"--head": self.head, "--eagle-head": self.eagle_head}
        check_sides(self.sides, {**options, "--schedule": self.schedule})

    def num_questions(self, concurrency: int) -> int:
        """Return how many questions a cell asks, if the dataset has as many."""
        return max(self.waves * concurrency, self.least)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "target": self.target,
            "dataset": self.dataset,
            "head": self.head,
            "eagle_head": self.eagle_head,
            **{name: list(getattr(self, name)) for name in AXES},
            "schedule": [list(entry) for entry in self.schedule] or None,
            "design": self.design,
            "repetitions": self.repetitions,
            "waves": self.waves,
            "least": self.least,
            "warm_up": self.warm_up,
            "serve_args": list(self.serve_args),
        }

    def groups(self) -> Iterator[tuple[int, list[Visit]]]:
        """Yield, for every K, the cells to be measured while its servers are up, in order.

        All sides of a point follow each other, so that a slow minute hits all of them; who goes
        first alternates from point to point and from repetition to repetition.
        """
        axes = {name: getattr(self, name) for name in POINT_AXES.values()}
        chosen = points(self.design, axes)
        for num_tokens in self.num_speculative_tokens:
            here = [point for point in chosen if point.num_speculative_tokens == num_tokens]
            yield (
                num_tokens,
                [
                    Visit(CellKey(side, dataset=self.dataset, **asdict(point)), repetition)
                    for repetition in range(self.repetitions)
                    for number, point in enumerate(here)
                    for side in turned(self.sides, repetition + number)
                ],
            )


@dataclass(frozen=True)
class Visit:
    """One measurement of a cell; ``repetition`` counts from 0."""

    key: CellKey
    repetition: int


def turned(sides: Sequence[str], turn: int) -> tuple[str, ...]:
    """Return the sides forwards on even turns, backwards on odd ones."""
    return tuple(sides) if turn % 2 == 0 else tuple(reversed(sides))


def different_settings(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first setting that two calls of one run must share and do not; None if none."""
    free = {*AXES, "repetitions"}
    names = [name for name in now if name not in free]
    changed = [name for name in names if earlier.get(name) != now[name]]
    changed = [name for name in changed if not _is_late(name, earlier, now)]
    if now.get("design") == "star":
        # The other axes were varied around their first values.
        changed += [name for name in POINT_AXES.values() if earlier[name][0] != now[name][0]]
    return next(iter(changed), None)


def _is_late(name: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return name in LATE and None in (earlier.get(name), now[name])


def _check_axis(name: str, values: Sequence[Any]) -> None:
    flag = "--" + name.replace("_", "-")
    if not values:
        raise ViSpecError(f"{flag} has no value: give at least one")
    if len(set(values)) < len(values):
        raise ViSpecError(f"{flag} names a value twice: name each once")


def _check_range(flag: str, values: Sequence[float], low: float, high: float | None) -> None:
    for value in values:
        if value < low or (high is not None and value > high):
            limits = f"at least {low}" if high is None else f"{low} to {high}"
            raise ViSpecError(f"{flag} {value}: choose {limits}")
