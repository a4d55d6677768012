"""What a report consists of, whatever it is written as. Text here is plain, renderers escape it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Code:
    """A piece of text as it is typed."""

    text: str


@dataclass(frozen=True)
class Strong:
    """A piece of text that must be seen."""

    text: str


Inline = str | Code | Strong
Line = Inline | tuple[Inline, ...]
"""One piece of text, or several in a row."""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; ``lead`` is set larger."""

    line: Line
    lead: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list."""

    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Table:
    """A table; every row has as many cells as ``head``. Numbers are aligned by the renderer.

    Attributes:
        text_columns: leading columns that hold text, the others hold numbers.
    """

    head: tuple[Line, ...]
    rows: tuple[tuple[Line, ...], ...]
    text_columns: int = 1

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"a row of {len(row)} cells in a table of {len(self.head)}")


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        name: file name without its ending; unique in a report.
        alt: what it shows, for those who do not see it.
        svg: the picture, complete in itself.
    """

    name: str
    alt: str
    svg: str


@dataclass(frozen=True)
class Verbatim:
    """Lines as they are typed; ``title`` says what they are."""

    title: str
    text: str


Block = Paragraph | Bullets | Table | Figure | Verbatim


@dataclass(frozen=True)
class Chapter:
    """A section as it is shown.

    Attributes:
        name: anchor, unique in a report.
    """

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    chapters: tuple[Chapter, ...]

    @property
    def figures(self) -> tuple[Figure, ...]:
        """All pictures in order."""
        blocks = [block for chapter in self.chapters for block in chapter.blocks]
        return tuple(block for block in blocks if isinstance(block, Figure))


def pieces(line: Line) -> Sequence[Inline]:
    """The pieces of a line."""
    return line if isinstance(line, tuple) else (line,)
