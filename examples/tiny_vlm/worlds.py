"""Random image contents: scenes, signs, bar charts and tables."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .canvas import Canvas
from .vocab import COLOR_NAMES, COLS, LABEL_LETTERS, ROWS, SHAPES, SIZES, WORDS

SLOTS: tuple[int, int, int] = (1, 3, 5)


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    size: str
    color: str
    shape: str

    @property
    def phrase(self) -> str:
        """Content phrase with marked slots."""
        return f"{{a}} {{{self.size}}} {{{self.color}}} {{{self.shape}}}"


@dataclass(frozen=True)
class Scene:
    """Three rows by three columns; every cell holds a thing or nothing."""

    cells: tuple[tuple[Thing | None, ...], ...]

    def at(self, row: int, col: int) -> Thing | None:
        return self.cells[row][col]

    def phrase(self, row: int, col: int) -> str:
        thing = self.at(row, col)
        return thing.phrase if thing else "{nothing}"

    def things(self) -> list[tuple[int, int, Thing]]:
        return [
            (r, c, thing)
            for r in range(len(ROWS))
            for c in range(len(COLS))
            if (thing := self.at(r, c)) is not None
        ]

    def draw(self) -> Canvas:
        canvas = Canvas()
        for r, c, thing in self.things():
            canvas.shape(SLOTS[r], SLOTS[c], thing.size, thing.color, thing.shape)
        return canvas


@dataclass(frozen=True)
class Sign:
    """Two words and a number, one per line."""

    lines: tuple[str, str, str]

    def draw(self) -> Canvas:
        canvas = Canvas()
        canvas.frame()
        for row, line in zip(SLOTS, self.lines, strict=True):
            for i, char in enumerate(line.upper()):
                canvas.glyph(row, 1 + i, char)
        return canvas


@dataclass(frozen=True)
class Bar:
    """One bar of a chart."""

    label: str
    color: str
    value: int


@dataclass(frozen=True)
class Chart:
    """Three bars with distinct labels and values."""

    bars: tuple[Bar, ...]

    def draw(self) -> Canvas:
        canvas = Canvas()
        for col, bar in zip(SLOTS, self.bars, strict=True):
            canvas.bar(col, bar.value, bar.color, bar.label)
        return canvas


@dataclass(frozen=True)
class Table:
    """Three rows: a label and two digits."""

    rows: tuple[tuple[str, int, int], ...]

    def draw(self) -> Canvas:
        canvas = Canvas()
        canvas.frame()
        for row, (label, first, second) in zip(SLOTS, self.rows, strict=True):
            for col, char in zip(SLOTS, (label, str(first), str(second)), strict=True):
                canvas.glyph(row, col, char)
        return canvas


World = Scene | Sign | Chart | Table


def random_scene(rng: Random) -> Scene:
    """Three to six things with distinct (colour, shape) pairs."""
    pairs = [(color, shape) for color in COLOR_NAMES for shape in SHAPES]
    count = rng.randint(3, 6)
    places = set(rng.sample(range(9), count))
    chosen = iter(rng.sample(pairs, count))
    cells: list[Thing | None] = []
    for place in range(9):
        cells.append(Thing(rng.choice(SIZES), *next(chosen)) if place in places else None)
    return Scene(tuple(tuple(cells[3 * r : 3 * r + 3]) for r in range(3)))


def random_sign(rng: Random) -> Sign:
    first, second = rng.sample(WORDS, 2)
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 4)))
    return Sign((first, second, digits))


def random_chart(rng: Random) -> Chart:
    labels = rng.sample(LABEL_LETTERS, 3)
    colors = rng.sample(COLOR_NAMES, 3)
    values = rng.sample(range(1, 10), 3)
    return Chart(tuple(Bar(*bar) for bar in zip(labels, colors, values, strict=True)))


def random_table(rng: Random) -> Table:
    labels = rng.sample(LABEL_LETTERS, 3)
    return Table(tuple((label, rng.randint(0, 9), rng.randint(0, 9)) for label in labels))
