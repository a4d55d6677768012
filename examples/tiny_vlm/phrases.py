"""Fixed sentence grammar of all answers. Braces mark words that depend on the image."""

from __future__ import annotations

from .vocab import COLS, ORDINALS, ROWS
from .worlds import Chart, Scene, Sign, Table, Thing

SMALL_TALK: dict[str, str] = {
    "Hello!": "Hello! I am a tiny model that looks at pictures. "
    "Send me a picture of a scene, a sign, a chart or a table and ask me about it.",
    "Who are you?": "I am a tiny vision language model. I was trained from scratch on two cores "
    "with pictures of shapes, signs, charts and tables.",
    "What can you do?": "I can describe a scene cell by cell, find a thing, read a sign, "
    "read out a chart or a table, and count things step by step.",
    "Thank you!": "You are welcome! Feel free to send me one more picture.",
    "How are you?": "I am fine, thank you. I am ready to look at the next picture.",
    "Which shapes do you know?": "I know six shapes: the circle, the square, the triangle, "
    "the star, the diamond and the cross.",
    "Which colors do you know?": "I know eight colors: red, green, blue, yellow, purple, orange, "
    "black and cyan.",
    "Tell me a story.": "Once there was a small red circle. It lived in the top row on the left. "
    "One day it met a large blue star, and since then they share a cell.",
}


def plural(shape: str) -> str:
    """Plural of a shape name."""
    return shape + ("es" if shape.endswith("ss") else "s")


def _all_cells() -> list[tuple[int, int]]:
    return [(r, c) for r in range(len(ROWS)) for c in range(len(COLS))]


def caption(scene: Scene) -> str:
    """Row by row, one sentence per cell."""
    cells = " ".join(
        f"In the {ROWS[r]} row, the {COLS[c]} cell shows {scene.phrase(r, c)}."
        for r, c in _all_cells()
    )
    return f"The picture shows a scene with three rows and three columns. {cells}"


def column_caption(scene: Scene) -> str:
    """Column by column, one sentence per cell."""
    cells = " ".join(
        f"In the {COLS[c]} column, the {ROWS[r]} cell shows {scene.phrase(r, c)}."
        for c, r in _all_cells()
    )
    return f"The picture shows a scene with three columns and three rows. {cells}"


def row_answer(scene: Scene, r: int) -> str:
    """All cells of one row."""
    cells = " ".join(
        f"In the {ROWS[r]} row, the {COLS[c]} cell shows {scene.phrase(r, c)}." for c in range(3)
    )
    return f"The {ROWS[r]} row has three cells. {cells}"


def column_answer(scene: Scene, c: int) -> str:
    """All cells of one column."""
    cells = " ".join(
        f"In the {COLS[c]} column, the {ROWS[r]} cell shows {scene.phrase(r, c)}." for r in range(3)
    )
    return f"The {COLS[c]} column has three cells. {cells}"


def _details(thing: Thing) -> str:
    return f"Its shape is a {thing.shape}, its color is {thing.color} and its size is {thing.size}."


def cell_answer(scene: Scene, r: int, c: int) -> str:
    """One cell, then the rest of its row."""
    thing = scene.at(r, c)
    extra = f" {_details(thing)}" if thing else " It is an empty cell."
    return (
        f"You ask about the {ROWS[r]} row and the {COLS[c]} column. "
        f"In the {ROWS[r]} row, the {COLS[c]} cell shows {scene.phrase(r, c)}.{extra} "
        f"{row_answer(scene, r)}"
    )


def place_answer(scene: Scene, r: int, c: int) -> str:
    """Position of one thing, then the rest of its row."""
    thing = scene.at(r, c)
    assert thing is not None
    return (
        f"You ask about the {thing.color} {thing.shape}. "
        f"The {thing.color} {thing.shape} is in the {{{ROWS[r]}}} row "
        f"and the {{{COLS[c]}}} column. "
        f"It is a {{{thing.size}}} one. {row_answer(scene, r)}"
    )


def _spell(line: str) -> str:
    return " ".join(f"{{{char}}}" for char in line.upper())


def _line(sign: Sign, i: int) -> str:
    line = sign.lines[i]
    if line.isdigit():
        return f"The {ORDINALS[i]} line is a number with the digits {_spell(line)}."
    return f"The {ORDINALS[i]} line is spelled {_spell(line)}, so it reads {{{line}}}."


def line_answer(sign: Sign, i: int) -> str:
    """One line of a sign."""
    return f"You ask about the {ORDINALS[i]} line of the sign. {_line(sign, i)}"


def sign_answer(sign: Sign) -> str:
    """All lines of a sign."""
    lines = " ".join(_line(sign, i) for i in range(3))
    first, second, number = sign.lines
    return (
        f"The sign has three lines of text. {lines} "
        f"All together, the sign says {first} {second} {' '.join(number)}."
    )


def chart_answer(chart: Chart) -> str:
    """All bars, then the highest and the lowest."""
    bars = " ".join(
        f"The {ORDINALS[i]} bar has the label {{{bar.label}}}, its color is {{{bar.color}}} "
        f"and its value is {{{bar.value}}}."
        for i, bar in enumerate(chart.bars)
    )
    high = max(chart.bars, key=lambda bar: bar.value)
    low = min(chart.bars, key=lambda bar: bar.value)
    return (
        f"This is a bar chart with three bars. {bars} "
        f"The highest bar is {{{high.label}}} with the value {{{high.value}}}. "
        f"The lowest bar is {{{low.label}}} with the value {{{low.value}}}."
    )


def table_answer(table: Table) -> str:
    """All rows of a table."""
    rows = " ".join(
        f"The {ORDINALS[i]} row has the label {{{label}}}, its first value is {{{first}}} "
        f"and its second value is {{{second}}}."
        for i, (label, first, second) in enumerate(table.rows)
    )
    return f"This is a table with three rows and two values in every row. {rows}"


def _cell_shape(scene: Scene, r: int, c: int) -> str:
    thing = scene.at(r, c)
    return f"{{a}} {{{thing.shape}}}" if thing else "{nothing}"


def _cell_color(scene: Scene, r: int, c: int) -> str:
    thing = scene.at(r, c)
    return f"{{a}} {{{thing.color}}} thing" if thing else "{nothing}"


def count_shape(scene: Scene, shape: str) -> str:
    """Running count over all cells."""
    steps, total = [], 0
    for r, c in _all_cells():
        thing = scene.at(r, c)
        total += thing is not None and thing.shape == shape
        steps.append(
            f"The {ROWS[r]} row, {COLS[c]} cell shows {_cell_shape(scene, r, c)}, "
            f"so we have {{{total}}}."
        )
    return f"Let us count the {plural(shape)}. {' '.join(steps)} The answer is {{{total}}}."


def count_color(scene: Scene, color: str) -> str:
    """Running count over all cells."""
    steps, total = [], 0
    for r, c in _all_cells():
        thing = scene.at(r, c)
        total += thing is not None and thing.color == color
        steps.append(
            f"The {ROWS[r]} row, {COLS[c]} cell shows {_cell_color(scene, r, c)}, "
            f"so we have {{{total}}}."
        )
    return f"Let us count the {color} things. {' '.join(steps)} The answer is {{{total}}}."


def compare_shapes(scene: Scene, first: str, second: str) -> str:
    """Two running counts over all cells."""
    steps, a, b = [], 0, 0
    for r, c in _all_cells():
        thing = scene.at(r, c)
        a += thing is not None and thing.shape == first
        b += thing is not None and thing.shape == second
        steps.append(
            f"The {ROWS[r]} row, {COLS[c]} cell shows {_cell_shape(scene, r, c)}, "
            f"so we have {{{a}}} and {{{b}}}."
        )
    verdict = "yes" if a > b else "no"
    return (
        f"Let us count the {plural(first)} and the {plural(second)}. {' '.join(steps)} "
        f"The answer is {{{verdict}}}."
    )


def sum_answer(a: int, b: int) -> str:
    """Text-only arithmetic."""
    return f"You ask for the sum of {a} and {b}. If we add {a} and {b}, we get {{{a + b}}}."


def spell_answer(word: str) -> str:
    """Text-only spelling."""
    return f"The word {word} is spelled {_spell(word)}, so it reads {word}."


def count_answer(end: int) -> str:
    """Text-only counting."""
    numbers = ", ".join(f"{{{i}}}" for i in range(1, end + 1))
    return f"Let us count to {end}. Here we go: {numbers}. That is all."


def color_answer(color: str) -> str:
    """Text-only facts."""
    return (
        f"The color {color} is one of the eight colors that I know. "
        f"I often see a small {color} star or a large {color} circle in a picture."
    )
