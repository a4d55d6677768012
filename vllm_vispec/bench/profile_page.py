"""A profile in tables, for the terminal and as Markdown, and as stacked bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table as RichTable

from vllm_vispec.bench.pages import to_markdown
from vllm_vispec.bench.profile_steps import FIRST_PASS, KINDS, PARTS, WHOLES, columns
from vllm_vispec.bench.profile_summary import Comparison, Profile
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEAD = ("part", "EAGLE, ms", "ViSpec, ms", "ratio", "95 %", "ratio of first deciles")
IMAGE_HEAD = ("image tokens", "requests", "rounds", *HEAD[1:])
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
        f"Rounds left out on the side {side}: "
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
        _number(found.ratio),
        NOTHING if interval is None else " to ".join(f"{end:.3f}" for end in interval),
        _number(found.ratio_first_decile),
    )


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"
