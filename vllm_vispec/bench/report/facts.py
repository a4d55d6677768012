"""What a run holds, row by row: one row for every cell of the matrix, whatever became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from vllm_vispec.bench.bootstrap import RESAMPLES
from vllm_vispec.bench.design import DESIGNS, POINT_AXES, points
from vllm_vispec.bench.intervals import Measured, with_interval
from vllm_vispec.bench.metrics import by_key, measure, plain_key
from vllm_vispec.bench.pairing import PLAIN_SIDE, answered, only_family
from vllm_vispec.bench.schema import IMAGES_AS_THEY_ARE, BenchRun, CellKey, CellResult
from vllm_vispec.bench.sides import SIDES

OURS = "vispec"
"""The side a report is about, if it was measured."""
_AXES = {"side": "sides", **POINT_AXES}


@dataclass(frozen=True, eq=False)
class Row:
    """All repetitions of one cell of the matrix.

    Attributes:
        number: its number in the report.
        cells: repetitions, failed ones included; empty if it was not measured.
        plain: repetitions of the plain cell it is compared with.
        expected: repetitions that were asked for.
        resamples: of every interval.
    """

    number: int
    key: CellKey
    cells: tuple[CellResult, ...]
    plain: tuple[CellResult, ...]
    expected: int
    resamples: int = RESAMPLES
    _found: dict[str, Measured] = field(default_factory=dict, repr=False)
    _values: dict[str, float | None] = field(default_factory=dict, repr=False)

    @property
    def done(self) -> int:
        """Repetitions that did not fail as a whole."""
        return sum(cell.error is None for cell in self.cells)

    @property
    def state(self) -> str:
        """ "missing", "failed", "ok", or "1 of 3" repetitions."""
        if not self.cells:
            return "missing"
        if not self.done:
            return "failed"
        return "ok" if self.done >= self.expected else f"{self.done} of {self.expected}"

    @property
    def families(self) -> tuple[str, ...]:
        """Task families that were asked, in the order of the dataset."""
        requests = (request for cell in self.cells for request in cell.requests)
        return tuple(dict.fromkeys(request.family for request in requests))

    @property
    def num_answered(self) -> int:
        """Requests of all repetitions that gave an answer."""
        return len(answered(self.cells))

    def of_family(self, family: str) -> Row:
        """The same with the requests of one family only."""
        cells, plain = only_family(self.cells, family), only_family(self.plain, family)
        return replace(self, cells=cells, plain=plain, _found={}, _values={})

    def value(self, name: str) -> float | None:
        """A metric with one value; None if it cannot be computed. Computed once."""
        if name not in self._values:
            found = measure(name, self.cells, self.plain)
            self._values[name] = None if isinstance(found, tuple) else found
        return self._values[name]

    def plain_value(self, name: str) -> float | None:
        """A metric of the plain side of the same cell."""
        found = measure(name, self.plain)
        return None if isinstance(found, tuple) else found

    def interval(self, name: str) -> Measured:
        """A metric with its interval; computed once."""
        if name not in self._found:
            self._found[name] = with_interval(name, self.cells, self.plain, self.resamples)
        return self._found[name]

    def positions(self) -> tuple[float, ...]:
        """Share of rounds that accepted each position; empty if nothing was drafted."""
        found = measure("accepted_at", self.cells)
        return found if isinstance(found, tuple) else ()


class Facts:
    """A run, arranged for the sections of a report.

    Args:
        resamples: of every interval; fewer are quicker and coarser.
    """

    def __init__(self, run: BenchRun, resamples: int = RESAMPLES) -> None:
        self.run = run
        groups = by_key(run.cells)
        repetitions = _repetitions(run)
        keys = sorted({*groups, *_expected_keys(run)}, key=_order)
        self.rows = tuple(
            Row(
                number,
                key,
                groups.get(key, ()),
                groups.get(plain_key(key), ()),
                repetitions,
                resamples,
            )
            for number, key in enumerate(keys, start=1)
        )

    @cached_property
    def drafting(self) -> tuple[Row, ...]:
        """Rows of all sides but the plain one."""
        return tuple(row for row in self.rows if row.key.side != PLAIN_SIDE)

    @cached_property
    def side(self) -> str:
        """The side the report is about: ViSpec, else the last one that drafts."""
        sides = self.sides
        return OURS if OURS in sides or not sides else sides[-1]

    @cached_property
    def sides(self) -> tuple[str, ...]:
        """Sides with a row, the plain one left out."""
        return tuple(dict.fromkeys(row.key.side for row in sorted_by_side(self.drafting)))

    @cached_property
    def main(self) -> Row | None:
        """The row a report leads with; None if no speedup could be computed.

        The lowest temperature and concurrency, images as they are (else the most image tokens),
        the first dataset; of these the K of which most was measured (of a star, its middle), then
        the one with the highest decode_speedup.
        """
        measured = [
            row
            for row in self.drafting
            if row.key.side == self.side and row.value("decode_speedup") is not None
        ]
        if not measured:
            return None
        first = min(measured, key=lambda row: _place(row.key))
        same = [row for row in measured if _place(row.key) == _place(first.key)]
        counts = Counter(row.key.num_speculative_tokens for row in measured)
        return max(
            same,
            key=lambda row: (
                counts[row.key.num_speculative_tokens],
                row.value("decode_speedup") or 0.0,
            ),
        )

    def find(self, rows: Iterable[Row] | None = None, **fixed: Any) -> tuple[Row, ...]:
        """Rows whose keys have these values."""
        chosen = self.drafting if rows is None else rows
        return tuple(
            row
            for row in chosen
            if all(getattr(row.key, name) == value for name, value in fixed.items())
        )

    def values(self, axis: str) -> tuple[Any, ...]:
        """Values of one field of the keys, in order, measured or not."""
        found = {getattr(row.key, axis) for row in self.drafting}
        return tuple(sorted(found, key=lambda value: _axis_order(axis, value)))


def slice_of(key: CellKey, *free: str) -> dict[str, Any]:
    """The fields of a key by name, without those that are free to vary."""
    return {name: getattr(key, name) for name in (*_AXES, "dataset") if name not in free}


def sorted_by_side(rows: Sequence[Row]) -> list[Row]:
    """Rows in the order in which sides are listed."""
    return sorted(rows, key=lambda row: (_side_order(row.key.side), row.number))


def image_text(tokens: int) -> str:
    """An image-token setting in words."""
    return "as they are" if tokens == IMAGES_AS_THEY_ARE else str(tokens)


def temperature_text(temperature: float) -> str:
    """A temperature in words."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def _repetitions(run: BenchRun) -> int:
    asked = run.settings.get("repetitions")
    if isinstance(asked, int) and not isinstance(asked, bool):
        return asked
    return 1 + max((cell.repetition for cell in run.cells), default=0)


def _expected_keys(run: BenchRun) -> list[CellKey]:
    """Keys of the whole matrix; none if the settings do not describe one."""
    settings: Mapping[str, Any] = run.settings
    axes = [settings.get(name) for name in _AXES.values()]
    if not isinstance(settings.get("dataset"), str) or not all(
        isinstance(axis, list | tuple) for axis in axes
    ):
        return []
    design = settings.get("design", "full")
    if design not in DESIGNS or not all(axes):
        return []
    return [
        CellKey(side, dataset=settings["dataset"], **asdict(point))
        for point in points(design, settings)
        for side in settings["sides"]
    ]


def _order(key: CellKey) -> tuple[Any, ...]:
    return (
        key.dataset,
        key.temperature,
        _axis_order("image_tokens", key.image_tokens),
        key.num_speculative_tokens,
        key.concurrency,
        _side_order(key.side),
    )


def _place(key: CellKey) -> tuple[Any, ...]:
    """The smallest is where a report looks first."""
    as_they_are = key.image_tokens == IMAGES_AS_THEY_ARE
    return (key.temperature, not as_they_are, -key.image_tokens, key.concurrency, key.dataset)


def _axis_order(axis: str, value: Any) -> tuple[Any, ...]:
    """Images as they are come last: how many tokens they have is not known."""
    return (axis == "image_tokens" and value == IMAGES_AS_THEY_ARE, value)


def _side_order(side: str) -> tuple[int, str]:
    names = list(SIDES)
    return (names.index(side) if side in names else len(names), side)
