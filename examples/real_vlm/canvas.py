"""Drawing on a grid of 28-pixel cells, each one image token, with the words that a cell shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.tiny_vlm.vocab import COLORS

from .pictures import PICTURES, picture

CELL = 28
# Corners and rotation of `regular_polygon`; a circle has none.
SHAPES = {
    "circle": (0, 0),
    "triangle": (3, 0),
    "square": (4, 0),
    "diamond": (4, 45),
    "hexagon": (6, 0),
}
Cell = tuple[int, int]


@dataclass(frozen=True)
class Mark:
    """A text that an image shows: its tokens belong to these cells, in order."""

    text: str
    cells: tuple[Cell, ...]


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


@lru_cache(maxsize=4096)
def word_cells(word: str, size: int) -> int:
    """Cells that a drawn word takes; a number takes one a digit."""
    if word.isdigit():
        return len(word)
    return -(-int(_font(size).getlength(word) + 4) // CELL)


@dataclass
class Canvas:
    """An image of `rows` x `cols` cells under construction.

    The ground changes from corner to corner, as light does: a cell shows where it is.
    """

    rows: int
    cols: int
    rng: Random
    paper: bool = False
    marks: list[Mark] = field(default_factory=list)

    def __post_init__(self) -> None:
        across = np.linspace(0, 1, self.cols * CELL)[None, :, None]
        down = np.linspace(0, 1, self.rows * CELL)[:, None, None]
        low = 235 if self.paper else 205
        corners = [np.array([self.rng.randint(low, 252) for _ in range(3)]) for _ in range(2)]
        slope = np.array([-30.0, 0, 0]) * across + np.array([0, 0, -30.0]) * down
        ground = corners[0] * (1 - down) + corners[1] * down + slope
        noise = np.random.default_rng(self.rng.getrandbits(32)).normal(0, 1.5, ground.shape)
        self.image = Image.fromarray((ground + noise).clip(0, 255).astype(np.uint8))
        self.draw = ImageDraw.Draw(self.image)
        self.ink = tuple(self.rng.randint(0, 70) for _ in range(3))

    @property
    def tokens(self) -> int:
        """Image tokens."""
        return self.rows * self.cols

    def thing(self, row: int, col: int, side: int, name: str, place: str) -> None:
        """Draw a picture or a coloured shape on `side` x `side` cells."""
        pixels = side * CELL - 4
        x, y = col * CELL + self.rng.randint(1, 3), row * CELL + self.rng.randint(1, 3)
        if name in PICTURES:
            drawn = picture(name, pixels)
            at = (x + (pixels - drawn.width) // 2, y + (pixels - drawn.height) // 2)
            self.image.paste(drawn, at, drawn)
        else:
            color, shape = name.split()
            corners, turn = SHAPES[shape]
            half, fill = pixels // 2, COLORS[color]
            if corners:
                self.draw.regular_polygon((x + half, y + half, half), corners, turn, fill)
            else:
                self.draw.ellipse([x, y, x + pixels, y + pixels], fill)
        middle = (row + (side - 1) // 2, col + (side - 1) // 2)
        self.marks += [Mark(f" {name}", (middle,)), Mark(f" {place}", (middle,))]

    def text(self, row: int, col: int, text: str, size: int = 19) -> int:
        """Write words from a cell on, each at the start of a cell; returns the next free column."""
        for word in text.split():
            if word.isdigit():
                for digit in word:
                    center = ((col + 0.5) * CELL, (row + 0.5) * CELL)
                    self.draw.text(center, digit, self.ink, _font(24), anchor="mm")
                    self.marks.append(Mark(digit, ((row, col),)))
                    col += 1
                continue
            at = (col * CELL + 2, (row + 0.5) * CELL)
            self.draw.text(at, word, self.ink, _font(size), anchor="lm")
            count = word_cells(word, size)
            self.marks.append(Mark(f" {word}", tuple((row, col + i) for i in range(count))))
            col += count
        return col

    def bar(self, row: int, col: int, height: int, width: int, color: str) -> None:
        """Fill cells with a colour (a bar of a chart), a margin left free."""
        box = [col * CELL + 3, row * CELL + 3, (col + width) * CELL - 4, (row + height) * CELL - 4]
        self.draw.rectangle(box, fill=COLORS[color])
        self.marks.append(Mark(f" {color}", ((row, col),)))

    def line(self, row: int, first: int, last: int) -> None:
        """A thin line under a row."""
        y = (row + 1) * CELL - 1
        self.draw.line([first * CELL, y, last * CELL, y], self.ink, 1)
