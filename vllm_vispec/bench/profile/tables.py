"""A profile in tables, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table as RichTable

from vllm_vispec.bench.pages import to_markdown
from vllm_vispec.bench.profile.parts import KINDS, WHOLES, columns, label_of
from vllm_vispec.bench.profile.result import ImageTokens, Profile
from vllm_vispec.bench.profile.statistics import Comparison, Summary

HEAD = ("part", "EAGLE, ms", "ViSpec, ms", "ratio", "95 %", "ratio of first deciles")
IMAGE_HEAD = ("image tokens", "requests", "rounds", *HEAD[1:])
FIRST_PASS_TITLE = "The draft's first pass over a prompt, by image tokens"
ALT = "Stacked bars of where the time goes, EAGLE next to ViSpec"
NOTHING = "-"
WIDTH = 110


class Table(NamedTuple):
    """A table; the first ``text_columns`` hold text, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


def kind_table(profile: Profile, kind: str) -> Table:
    """Return the parts of one kind of round, and what overlaps them."""
    summary = profile.rounds[kind]
    drafts = profile.settings["num_speculative_tokens"]
    labels = {name: label_of(name, part) for name, part in columns(kind, drafts).items()}
    parts = [(labels[name], summary.parts[name]) for name in summary.parts]
    wholes = [(WHOLES[name], summary.wholes[name]) for name in summary.wholes]
    return Table(HEAD, tuple((label, *_cells(found)) for label, found in [*parts, *wholes]))


def image_tables(profile: Profile) -> Iterator[tuple[str, Table]]:
    """Yield, with titles, the first pass against the number of image tokens."""
    rows = profile.prefill_by_image_tokens
    views = {
        "the model's part": lambda one: one.parts["draft_first_pass"],
        WHOLES["first_pass"]: lambda one: one.wholes["first_pass"],
    }
    for title, view in views.items():
        cells = tuple(_image_cells(row, view(row.summary)) for row in rows)
        yield f"{FIRST_PASS_TITLE}: {title}", Table(IMAGE_HEAD, cells, text_columns=0)


def tables(profile: Profile) -> Iterator[tuple[str, Table]]:
    """Yield all tables with their titles."""
    for kind in KINDS:
        yield kind_title(profile.rounds[kind], kind), kind_table(profile, kind)
    yield from image_tables(profile)


def kind_title(summary: Summary, kind: str) -> str:
    """Return what a table of one kind is called."""
    return f"{KINDS[kind]}, medians over {summary.rounds} on each side"


def print_profile(profile: Profile, console: Console | None = None) -> None:
    """Print tables and notes."""
    console = console or Console(width=WIDTH)
    for title, table in tables(profile):
        console.print(_rich(title, table))
    for line in [*profile.notes, *left_out_lines(profile)]:
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
        notes=[*profile.notes, *left_out_lines(profile)],
        alt=ALT,
        picture=picture,
    )


def left_out_lines(profile: Profile) -> list[str]:
    """Return how many rounds are in no table, and why; empty if none."""
    return [
        f"Rounds left out on the side {side}: "
        + ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        for side, reasons in profile.left_out.items()
        if reasons
    ]


def _rich(title: str, table: Table) -> RichTable:
    shown = RichTable(title=title)
    for place, name in enumerate(table.head):
        shown.add_column(str(name), justify="left" if place < table.text_columns else "right")
    for row in table.rows:
        shown.add_row(*map(str, row))
    return shown


def _image_cells(row: ImageTokens, found: Comparison) -> tuple[str, ...]:
    counts = (row.image_tokens, row.requests, row.summary.rounds)
    return (*map(str, counts), *_cells(found))


def _cells(found: Comparison) -> Sequence[str]:
    return (
        f"{1000 * found.eagle.median:.3f}",
        f"{1000 * found.vispec.median:.3f}",
        _number(found.ratio),
        NOTHING
        if found.ratio_interval_95 is None
        else " to ".join(f"{end:.3f}" for end in found.ratio_interval_95),
        _number(found.ratio_first_decile),
    )


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"
