"""Drawing on a grid of 28-pixel cells (one cell is one visual token) with per-cell labels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .vocab import COLOR_NAMES, COLORS, GLYPHS, SHAPES, SIZES

CELL = 28
GRID = 7
SIDE = CELL * GRID
HALF_SIZE: dict[str, int] = {"small": 8, "large": 17}

# Number of classes of each auxiliary label; 0 means "none" except for row and col.
LABEL_CLASSES: dict[str, int] = {
    "row": GRID,
    "col": GRID,
    "shape": len(SHAPES) + 1,
    "color": len(COLORS) + 1,
    "size": len(SIZES) + 1,
    "glyph": len(GLYPHS) + 1,
    "value": 10,
}
IGNORE = -1


@lru_cache(maxsize=1)
def _background() -> np.ndarray:
    """Light gradient: red falls with x, blue falls with y, so a cell shows where it is."""
    ramp = np.linspace(0, 60, SIDE)
    rgb = np.full((SIDE, SIDE, 3), 248.0)
    rgb[:, :, 0] -= ramp[None, :]
    rgb[:, :, 2] -= ramp[:, None]
    return rgb.astype(np.uint8)


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _ring(
    cx: float, cy: float, radii: tuple[float, ...], start: float
) -> list[tuple[float, float]]:
    step = 2 * math.pi / len(radii)
    return [
        (cx + r * math.cos(start + i * step), cy + r * math.sin(start + i * step))
        for i, r in enumerate(radii)
    ]


def _polygon(shape: str, cx: float, cy: float, r: float) -> list[tuple[float, float]]:
    """Corner points of every shape that is a polygon."""
    third = r / 3
    outlines = {
        "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "triangle": [(0, -r), (r, r), (-r, r)],
        "diamond": [(0, -r), (r * 0.75, 0), (0, r), (-r * 0.75, 0)],
        "cross": [
            (-third, -r),
            (third, -r),
            (third, -third),
            (r, -third),
            (r, third),
            (third, third),
            (third, r),
            (-third, r),
            (-third, third),
            (-r, third),
            (-r, -third),
            (-third, -third),
        ],
    }
    if shape in outlines:
        return [(cx + x, cy + y) for x, y in outlines[shape]]
    return _ring(cx, cy, (r * 1.1, r * 0.45) * 5, -math.pi / 2)


def _blank_labels() -> dict[str, np.ndarray]:
    labels = {name: np.zeros((GRID, GRID), dtype=np.int64) for name in LABEL_CLASSES}
    labels["row"] += np.arange(GRID)[:, None]
    labels["col"] += np.arange(GRID)[None, :]
    return labels


@dataclass
class Canvas:
    """An image under construction together with the content label of every cell."""

    image: Image.Image = field(default_factory=lambda: Image.fromarray(_background()))
    labels: dict[str, np.ndarray] = field(default_factory=_blank_labels)

    def __post_init__(self) -> None:
        self._draw = ImageDraw.Draw(self.image)

    def shape(self, row: int, col: int, size: str, color: str, shape: str) -> None:
        """Draw one object in the centre of a cell."""
        cx, cy, r = (col + 0.5) * CELL, (row + 0.5) * CELL, HALF_SIZE[size]
        fill = COLORS[color]
        if shape == "circle":
            self._draw.ellipse([cx - r, cy - r, cx + r, cy + r], fill=fill)
        else:
            self._draw.polygon(_polygon(shape, cx, cy, r), fill=fill)
        self.labels["shape"][row, col] = SHAPES.index(shape) + 1
        self.labels["color"][row, col] = COLOR_NAMES.index(color) + 1
        self.labels["size"][row, col] = SIZES.index(size) + 1

    def glyph(self, row: int, col: int, char: str) -> None:
        """Draw one letter or digit in a cell."""
        center = ((col + 0.5) * CELL, (row + 0.5) * CELL)
        self._draw.text(center, char, fill=(10, 10, 10), font=_font(26), anchor="mm")
        self.labels["glyph"][row, col] = GLYPHS.index(char) + 1

    def bar(self, col: int, value: int, color: str, label: str) -> None:
        """Draw a vertical bar above the label cell of the last row."""
        base = (GRID - 1) * CELL
        box = [col * CELL + 2, base - value * 17, (col + 1) * CELL - 3, base - 1]
        self._draw.rectangle(box, fill=COLORS[color])
        self.glyph(GRID - 1, col, label)
        for name in LABEL_CLASSES:
            if name not in ("row", "col"):
                self.labels[name][: GRID - 1, col] = IGNORE
        self.labels["row"][: GRID - 1, col] = IGNORE
        self.labels["col"][: GRID - 1, col] = IGNORE
        self.labels["color"][GRID - 1, col] = COLOR_NAMES.index(color) + 1
        self.labels["value"][GRID - 1, col] = value

    def frame(self) -> None:
        """Thin border around the picture (signs and tables)."""
        self._draw.rectangle([1, 1, SIDE - 2, SIDE - 2], outline=(90, 90, 90), width=2)
