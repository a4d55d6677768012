"""Closed word lists of the synthetic world."""

from __future__ import annotations

ROWS: tuple[str, ...] = ("top", "middle", "bottom")
COLS: tuple[str, ...] = ("left", "center", "right")
SIZES: tuple[str, ...] = ("small", "large")
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "diamond", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 150, 50),
    "blue": (30, 60, 220),
    "yellow": (240, 210, 20),
    "purple": (140, 40, 160),
    "orange": (245, 130, 20),
    "black": (20, 20, 20),
    "cyan": (40, 190, 210),
}
COLOR_NAMES: tuple[str, ...] = tuple(COLORS)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
GLYPHS = LETTERS + DIGITS
LABEL_LETTERS = "ABCDEFGHKM"
ORDINALS: tuple[str, ...] = ("first", "second", "third")

_WORD_LIST = """
apple bird book bread bus cake car cat chair city clock cloud coat cold corn cup dance desk
dog door dress drum duck eagle earth exit farm fish flag flute fox frog game gate glass goat
gold grape green hat home honey horse hot house ice jam jet juice king kite lake lamp leaf
lemon light lion map milk moon mouse music nest night north ocean olive open owl paint park
pen piano pizza plant pond queen quiz rain ring river road rock rose sail salt sand ship shoe
shop snow sofa soup south stop storm sugar sun table taxi tea tent tiger toy train tree truck
tulip van vase water west whale wind wolf wood yard zebra zero zoo
"""
WORDS: tuple[str, ...] = tuple(_WORD_LIST.split())
