"""Random contents of images: scenes, charts, tables, documents; drawn, and as facts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from examples.tiny_vlm.vocab import COLOR_NAMES

from .canvas import SHAPES, Canvas, word_cells
from .pictures import PICTURES
from .words import CHARTS, PHRASES, WORDS, sentence

ROWS, COLS = ("top", "middle", "bottom"), ("left", "center", "right")
PLACES = tuple(
    "center" if (r, c) == (1, 1) else f"{ROWS[r]} {COLS[c]}" for r in range(3) for c in range(3)
)


@dataclass(frozen=True)
class Thing:
    """Something in a scene and where it is, one of nine places."""

    name: str
    place: str


@dataclass(frozen=True)
class Scene:
    """Things in reading order."""

    canvas: Canvas
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Chart:
    """Bars with values from 1 to 99."""

    canvas: Canvas
    title: str
    unit: str
    bars: tuple[tuple[str, int, str], ...]


@dataclass(frozen=True)
class Table:
    """A row a name, a column a quantity."""

    canvas: Canvas
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Document:
    """A title and lines of words."""

    canvas: Canvas
    title: str
    lines: tuple[str, ...]


World = Scene | Chart | Table | Document


def grid(rng: Random) -> tuple[int, int]:
    """Rows and columns of a scene: 64 to 1,024 cells, most of them at the lower end."""
    low, high = rng.choices(((64, 144), (144, 324), (324, 1024)), (60, 32, 8))[0]
    cells, shape = rng.uniform(low, high), math.exp(rng.uniform(-0.4, 0.4))
    rows = max(6, round(math.sqrt(cells / shape)))
    cols = max(6, min(1024 // rows, math.ceil(cells / rows)))
    return rows, max(cols, -(-64 // rows))


def scene(rng: Random, names: list[str] | None = None) -> Scene:
    """Three to twelve pictures and shapes; given names appear once each, with nothing else."""
    rows, cols = grid(rng)
    canvas = Canvas(rows, cols, rng)
    if names is None:
        shapes = [f"{color} {shape}" for color in COLOR_NAMES for shape in SHAPES]
        count = rng.randint(3, min(12, 3 + rows * cols // 28))
        names = [
            rng.choice(shapes if rng.random() < 0.25 else list(PICTURES)) for _ in range(count)
        ]
        if rng.random() < 0.35:
            names += [names[0]] * rng.randint(1, 3)
    free = {(r, c) for r in range(rows) for c in range(cols)}
    found: list[tuple[int, int, int, int, Thing]] = []
    for name in names:
        for attempt in range(30):
            side = max(2, rng.randint(2, max(2, min(rows, cols) // 3)) - attempt // 8)
            row, col = rng.randint(0, rows - side), rng.randint(0, cols - side)
            taken = {(row + i, col + j) for i in range(side) for j in range(side)}
            if taken <= free:
                free -= taken
                r, c = int(3 * (row + side / 2) / rows), int(3 * (col + side / 2) / cols)
                place = PLACES[3 * r + c]
                canvas.thing(row, col, side, name, place)
                found.append((r, c, row, col, Thing(name, place)))
                break
    return Scene(canvas, tuple(one[-1] for one in sorted(found, key=lambda one: one[:4])))


def chart(rng: Random) -> Chart:
    """Three to eight bars, upright or lying, each with its name and its value."""
    title, (names, unit) = rng.choice(list(CHARTS.items()))
    count = rng.randint(3, 8)
    chosen = rng.sample(names, count)
    values = rng.sample(range(1, 100), count)
    colors = rng.sample(COLOR_NAMES, count)
    widest = max(word_cells(name, 19) for name in chosen)
    if rng.random() < 0.5:
        rows, cols = max(9, rng.randint(9, 14)), max(8, (widest + 1) * count + 1)
        canvas = Canvas(rows, cols, rng, paper=True)
        for i, (name, value, color) in enumerate(zip(chosen, values, colors, strict=True)):
            col, height = 1 + i * (widest + 1), max(1, round(value / 99 * (rows - 4)))
            canvas.bar(rows - 1 - height, col, height, 2, color)
            canvas.text(rows - 2 - height, col, str(value))
            canvas.text(rows - 1, col, name)
    else:
        length = rng.randint(6, 12)
        canvas = Canvas(max(7, count + 3), widest + length + 5, rng, paper=True)
        for i, (name, value, color) in enumerate(zip(chosen, values, colors, strict=True)):
            width = max(1, round(value / 99 * length))
            canvas.text(i + 2, 1, name)
            canvas.bar(i + 2, widest + 2, 1, width, color)
            canvas.text(i + 2, widest + 2 + width, str(value))
    canvas.text(0, 1, title, 22)
    return Chart(canvas, title, unit, tuple(zip(chosen, values, colors, strict=True)))


def table(rng: Random) -> Table:
    """Three to ten rows with two to four numbers."""
    names = rng.choice(list(CHARTS.values()))[0]
    chosen = rng.sample(names, rng.randint(3, min(8, len(names))))
    columns = tuple(rng.sample(WORDS["column"], rng.randint(2, 4)))
    widest = max(word_cells(name, 19) for name in chosen)
    canvas = Canvas(
        max(6, len(chosen) + 2), max(11, widest + 1 + 3 * len(columns)), rng, paper=True
    )
    for i, column in enumerate(columns):
        canvas.text(0, widest + 1 + 3 * i, column)
    canvas.line(0, 0, canvas.cols)
    rows = tuple((name, tuple(rng.randint(1, 99) for _ in columns)) for name in chosen)
    for r, (name, values) in enumerate(rows):
        canvas.text(r + 1, 0, name)
        for i, value in enumerate(values):
            canvas.text(r + 1, widest + 1 + 3 * i, str(value))
    return Table(canvas, columns, rows)


def document(rng: Random) -> Document:
    """A title and three to fourteen lines, each a sentence."""
    count = rng.choice((3, 3, 4, 4, 5, 6, 7, 8, 10, 14))
    lines = tuple(sentence(rng) for _ in range(count))
    width = max(sum(word_cells(word, 19) for word in line.split()) for line in lines)
    canvas = Canvas(max(count + 2, 5), max(width + 1, 13), rng, paper=True)
    title = rng.choice(PHRASES["titles"])
    canvas.text(0, rng.randint(0, 4), title, 22)
    for i, line in enumerate(lines):
        canvas.text(i + 2, 0, line)
    return Document(canvas, title, lines)
