"""What a section is, and the columns that many of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor

from vllm_vispec.bench.intervals import Measured
from vllm_vispec.bench.report.blocks import Block, Line, Strong
from vllm_vispec.bench.report.facts import Facts, Row, image_text, temperature_text
from vllm_vispec.bench.schema import CellKey

NOTHING = "-"
SPEEDUP_HEAD: tuple[Line, ...] = (
    "decode_speedup (95 %)",
    "e2e_speedup",
    "identical outputs",
    "mean output, side / plain",
)
"""No speedup is shown without the two columns behind it."""


@dataclass(frozen=True)
class Section:
    """A section of the report.

    Attributes:
        name: anchor and prefix of its pictures.
        title: as shown.
        build: makes its blocks; none if there is no data for it.
        empty: the line that is shown without data.
    """

    name: str
    title: str
    build: Callable[[Facts], Sequence[Block]]
    empty: str


def speedup_cells(row: Row) -> tuple[Line, ...]:
    """The cells under `SPEEDUP_HEAD`; one that failed or was not measured says so."""
    if not row.done:
        return (Strong(row.state), *(NOTHING,) * (len(SPEEDUP_HEAD) - 1))
    return (
        speedup_text(row.interval("decode_speedup")),
        speedup_text(Measured(row.value("e2e_speedup"))),
        identical_text(row),
        f"{number(row.value('mean_output_tokens'))} / "
        f"{number(row.plain_value('mean_output_tokens'))}",
    )


def speedup_text(found: Measured) -> Line:
    """A speedup with its interval; strong where it is a loss."""
    if not isinstance(found.value, float):
        return NOTHING
    text = f"{found.value:.2f}" + interval_text(found)
    return Strong(text) if found.value < 1 else text


def interval_text(found: Measured) -> str:
    """An interval in brackets, "" if there is none."""
    if not isinstance(found.low, float) or not isinstance(found.high, float):
        return ""
    return f" ({found.low:.2f} to {found.high:.2f})"


def identical_text(row: Row) -> Line:
    """The share of identical outputs; strong where outputs differ."""
    if row.key.temperature > 0:
        return "sampled"
    found = row.value("identical_outputs")
    if found is None:
        return NOTHING
    return share(found) if found == 1 else Strong(share(found))


def share(value: float | None) -> str:
    """A share in per cent, rounded down: only all is 100 %."""
    return NOTHING if value is None else f"{floor(value * 1000) / 10:g} %"


def number(value: float | None, digits: int = 1) -> str:
    """A number, or a dash."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def point_text(key: CellKey, *free: str) -> str:
    """Where in the matrix a cell lies, without the fields that vary."""
    parts = {
        "num_speculative_tokens": f"K = {key.num_speculative_tokens}",
        "concurrency": f"concurrency {key.concurrency}",
        "temperature": temperature_text(key.temperature),
        "image_tokens": f"image tokens {image_text(key.image_tokens)}",
        "dataset": f"dataset {key.dataset}",
    }
    return ", ".join(text for name, text in parts.items() if name not in free)
