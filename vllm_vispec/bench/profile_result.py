"""What a profile says: medians, deciles and ratios with intervals, in tables and as stacked bars.

Arrays: R steps, C columns (parts, then wholes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as RichTable

from vllm_vispec.bench.bootstrap import RESAMPLES, bootstrap
from vllm_vispec.bench.metrics import Numbers
from vllm_vispec.bench.pages import to_markdown
from vllm_vispec.bench.profile_steps import FIRST_PASS, KINDS, PARTS, WHOLES, Step, columns
from vllm_vispec.bench.schema import Record
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EAGLE, VISPEC = "eagle", "vispec"
SIDES = (EAGLE, VISPEC)
DECILES = (0.1, 0.9)

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Block:
    """The steps of one group of questions in one repetition, as many on both sides.

    Attributes:
        eagle, vispec: the first of one are the counterparts of the first of the other.
    """

    eagle: tuple[Step, ...]
    vispec: tuple[Step, ...]

    def select(self, **fields: Any) -> Block:
        """Return the block of the steps with these values."""
        sides = (
            tuple(one for one in side if all(getattr(one, n) == v for n, v in fields.items()))
            for side in (self.eagle, self.vispec)
        )
        return Block(*sides)


@dataclass(frozen=True)
class Figures(Record):
    """Seconds of one side: the median, its 95 % interval if there is one, and the first decile.

    The first decile is what something costs while nothing else disturbs the machine.
    """

    median: float
    interval_95: Interval
    first_decile: float


@dataclass(frozen=True)
class Comparison(Record):
    """A part on both sides. Ratios are ViSpec's over EAGLE's; None where EAGLE has no such part."""

    eagle: Figures
    vispec: Figures
    ratio: float | None
    ratio_interval_95: Interval
    ratio_first_decile: float | None


@dataclass(frozen=True)
class Summary(Record):
    """One kind of step.

    Attributes:
        rounds: how many steps on each side.
        parts, wholes: by name.
        typical: for each side, mean seconds by part over the steps whose time lies between the
            first and the last decile. Unlike medians these add up to a step.
    """

    rounds: int
    parts: dict[str, Comparison]
    wholes: dict[str, Comparison]
    typical: dict[str, dict[str, float]]


@dataclass(frozen=True)
class ImageTokens(Record):
    """Prefills over so many image tokens of so many requests together."""

    image_tokens: int
    requests: int
    summary: Summary


@dataclass(frozen=True)
class Profile(Record):
    """Where a step's time goes, on both sides.

    Attributes:
        format: `FORMAT` of the version that wrote it.
        machine: see `describe_machine`.
        settings: see `ProfileSettings`.
        command: what a user types to measure this again.
        notes: what has to be known to read the numbers.
        left_out: steps that are not among these, by side and reason.
        rounds: steps by kind, decode and prefill.
        prefill_by_image_tokens: prefills apart, fewest image tokens first.
    """

    format: int
    machine: dict[str, Any]
    settings: dict[str, Any]
    command: str
    notes: tuple[str, ...]
    left_out: dict[str, dict[str, int]]
    rounds: dict[str, Summary]
    prefill_by_image_tokens: tuple[ImageTokens, ...]


def summarise(blocks: Sequence[Block], resamples: int = RESAMPLES, seed: int = 0) -> Summary:
    """Compare the steps of blocks, all of one kind and split alike.

    A resample of an interval draws blocks with replacement, the same for both sides: it answers how
    different a number might be for other questions of the kind or at another minute of the run.

    Args:
        blocks: at least one with a step.
    """
    blocks = [block for block in blocks if block.eagle]
    first = blocks[0].eagle[0]
    tables = np.empty((len(SIDES), len(blocks)), dtype=object)
    for number, block in enumerate(blocks):
        tables[0, number], tables[1, number] = _table(block.eagle), _table(block.vispec)
    pooled_RC = [np.concatenate(list(side)) for side in tables]
    names = [*first.seconds, *first.wholes]
    # One block says nothing about how blocks differ: no interval.
    ends = np.full((2, len(SIDES) + 1, len(names)), np.nan)
    if len(blocks) > 1:
        ends = bootstrap(tables, (1,), _medians_and_ratio, resamples, seed)
    medians, deciles = _medians_and_ratio(tables), [np.quantile(x, 0.1, axis=0) for x in pooled_RC]
    decile_ratio = _divide(deciles[1], deciles[0])

    def figures(side: int, place: int) -> Figures:
        interval = _interval(ends[:, side, place])
        return Figures(float(medians[side][place]), interval, float(deciles[side][place]))

    def compared(place: int) -> Comparison:
        return Comparison(
            figures(0, place),
            figures(1, place),
            _number(medians[2][place]),
            _interval(ends[:, 2, place]),
            _number(decile_ratio[place]),
        )

    comparisons = {name: compared(place) for place, name in enumerate(names)}
    step_column = names.index("round")
    return Summary(
        rounds=len(pooled_RC[0]),
        parts={name: comparisons[name] for name in first.seconds},
        wholes={name: comparisons[name] for name in first.wholes},
        typical={
            side: dict(zip(first.seconds, _typical(table, step_column), strict=False))
            for side, table in zip(SIDES, pooled_RC, strict=True)
        },
    )


def by_image_tokens(blocks: Sequence[Block]) -> tuple[ImageTokens, ...]:
    """Split prefills by their number of image tokens and of requests."""
    keys = sorted({(one.image_tokens, one.requests) for block in blocks for one in block.eagle})
    return tuple(
        ImageTokens(
            tokens,
            requests,
            summarise([one.select(image_tokens=tokens, requests=requests) for one in blocks]),
        )
        for tokens, requests in keys
    )


def _table(steps: Sequence[Step]) -> Numbers:
    """Return seconds, ``[R, C]``."""
    return np.array([[*one.seconds.values(), *one.wholes.values()] for one in steps])


def _medians_and_ratio(drawn: NDArray[Any]) -> Numbers:
    """Return EAGLE's medians, ViSpec's, and their ratio (NaN where EAGLE has none), ``[3, C]``."""
    eagle, vispec = (np.median(np.concatenate(list(side)), axis=0) for side in drawn)
    return np.stack([eagle, vispec, _divide(vispec, eagle)])


def _divide(above: Numbers, below: Numbers) -> Numbers:
    return np.divide(above, below, out=np.full_like(below, np.nan), where=below > 0)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _interval(ends: Numbers) -> Interval:
    """Return the ends as numbers; a NaN in a resample made both of them NaN."""
    low, high = ends.tolist()
    return None if np.isnan(low) else (low, high)


def _typical(table_RC: Numbers, step_column: int) -> list[float]:
    totals = table_RC[:, step_column]
    low, high = np.quantile(totals, DECILES)
    middle = (totals >= low) & (totals <= high)
    # Of two steps none lies between the deciles.
    found: list[float] = (table_RC[middle] if middle.any() else table_RC).mean(axis=0).tolist()
    return found


HEAD = ("part", "EAGLE, ms", "ViSpec, ms", "ratio", "95 %", "ratio of first deciles")
IMAGE_HEAD = ("image tokens", "requests", "steps", *HEAD[1:])
LABELS = {"eagle": "EAGLE", "vispec": "ViSpec"}
ALT = "Stacked bars of where the time goes, EAGLE next to ViSpec"
NOTHING = "-"
WIDTH = 110
SIZE, PNG_DPI = (9.5, 5.5), 120
# Text as outlines, so that it looks the same everywhere; the same bytes for the same numbers.
_STYLE = {"svg.fonttype": "path", "svg.hashsalt": "vispec", "font.family": "DejaVu Sans"}
_NO_METADATA = {
    "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
    "png": {"Software": None},
}


class Table(NamedTuple):
    """A table; the first ``text_columns`` hold text, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


def tables(profile: Profile) -> Iterator[tuple[str, Table]]:
    """Yield all tables with their titles."""
    drafts = profile.settings["num_speculative_tokens"]
    for kind, title in KINDS.items():
        summary = profile.rounds[kind]
        labels = {
            name: part.label + name.removeprefix(part.name).replace("_", " ")
            for name, part in columns(kind, drafts).items()
        }
        found = {**summary.parts, **summary.wholes}
        labels |= {name: WHOLES[name] for name in summary.wholes}
        rows = [(labels[name], *_cells(one)) for name, one in found.items()]
        yield f"{title}, medians over {summary.rounds} on each side", Table(HEAD, rows)
    for name, label in ((FIRST_PASS, "the model's part"), ("first_pass", WHOLES["first_pass"])):
        rows = [
            (
                *map(str, (one.image_tokens, one.requests, one.summary.rounds)),
                *_cells({**one.summary.parts, **one.summary.wholes}[name]),
            )
            for one in profile.prefill_by_image_tokens
        ]
        title = f"The draft's first pass over a prompt, by image tokens: {label}"
        yield title, Table(IMAGE_HEAD, rows, text_columns=0)


def all_notes(profile: Profile) -> list[str]:
    """Return what has to be known, and how many steps are in no table, and why."""
    left_out = [
        f"Steps left out, {side}: "
        + ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        for side, reasons in profile.left_out.items()
        if reasons
    ]
    return [*profile.notes, *left_out]


def print_profile(profile: Profile, console: Console | None = None) -> None:
    """Print tables and notes."""
    console = console or Console(width=WIDTH)
    for title, table in tables(profile):
        shown = RichTable(title=title)
        for place, name in enumerate(table.head):
            shown.add_column(name, justify="left" if place < table.text_columns else "right")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for line in all_notes(profile):
        console.print(f"- {line}", highlight=False, markup=False)


def to_page(profile: Profile, picture: str) -> str:
    """Return the profile as Markdown.

    Args:
        picture: file of the stacked bars, beside the page.
    """
    return to_markdown(
        "profile.md.j2",
        profile=profile,
        tables=list(tables(profile)),
        notes=all_notes(profile),
        alt=ALT,
        picture=picture,
    )


def draw(profile: Profile, folder: Path) -> None:
    """Write `profile.svg` and `profile.png`: every kind of step apart.

    Raises:
        ViSpecError: matplotlib is not installed, or the folder cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ViSpecError(
            "the picture needs matplotlib: pip install 'vllm-vispec[bench]'"
        ) from error
    drafts = profile.settings["num_speculative_tokens"]
    with rc_context(_STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        for place, (kind, title) in enumerate(KINDS.items(), start=1):
            axes = figure.add_subplot(1, len(KINDS), place)
            for side in LABELS:
                _draw_bar(axes, kind, side, profile.rounds[kind].typical[side], drafts)
            axes.set_title(title, fontsize="medium")
            axes.set_ylabel("ms")
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
            axes.margins(x=0.15)
        # In the order of the bars, from the top.
        legend = [Patch(color=part.color, label=part.label) for part in reversed(PARTS)]
        figure.legend(handles=legend, loc="outside right center", fontsize="small")
        title = f"Where a step's time goes, K = {drafts}. {profile.notes[0]}"
        figure.suptitle(title, fontsize="small")
        for ending, metadata in _NO_METADATA.items():
            with writing(folder / f"profile.{ending}") as aside:
                figure.savefig(aside, format=ending, metadata=metadata, dpi=PNG_DPI)


def _draw_bar(axes: Axes, kind: str, side: str, seconds: dict[str, float], drafts: int) -> None:
    bottom = 0.0
    for name, part in columns(kind, drafts).items():
        height = 1000 * seconds[name]
        axes.bar(
            LABELS[side], height, bottom=bottom, color=part.color, edgecolor="white", linewidth=0.5
        )
        bottom += height
    axes.text(LABELS[side], bottom, f"{bottom:.2f}", ha="center", va="bottom", fontsize="small")


def _cells(found: Comparison) -> Sequence[str]:
    interval = found.ratio_interval_95
    return (
        f"{1000 * found.eagle.median:.3f}",
        f"{1000 * found.vispec.median:.3f}",
        _text(found.ratio),
        NOTHING if interval is None else " to ".join(f"{end:.3f}" for end in interval),
        _text(found.ratio_first_decile),
    )


def _text(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"
