"""Registry of task families. Each turns a random generator into a dialogue.

Answers mark their image-dependent words with braces: ``a {red} {circle}``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from . import phrases
from .vocab import COLOR_NAMES, COLS, ORDINALS, ROWS, SHAPES, WORDS
from .worlds import (
    Scene,
    World,
    random_chart,
    random_scene,
    random_sign,
    random_table,
)


@dataclass(frozen=True)
class Turn:
    """A question and its marked-up answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Dialogue:
    """An optional image content and the turns about it."""

    world: World | None
    turns: tuple[Turn, ...]


Family = Callable[[Random], Dialogue]
FAMILIES: dict[str, Family] = {}


def family(name: str) -> Callable[[Family], Family]:
    """Register a task family under a name."""

    def register(function: Family) -> Family:
        FAMILIES[name] = function
        return function

    return register


def _ask_cell(rng: Random, scene: Scene) -> Turn:
    r, c = rng.randrange(3), rng.randrange(3)
    question = rng.choice(
        (
            f"What is in the {ROWS[r]} row on the {COLS[c]}?",
            f"What does the {COLS[c]} cell of the {ROWS[r]} row show?",
        )
    )
    return Turn(question, phrases.cell_answer(scene, r, c))


def _ask_place(rng: Random, scene: Scene) -> Turn:
    r, c, thing = rng.choice(scene.things())
    question = rng.choice(
        (
            f"Where is the {thing.color} {thing.shape}?",
            f"In which cell can I find the {thing.color} {thing.shape}?",
        )
    )
    return Turn(question, phrases.place_answer(scene, r, c))


def _ask_row(rng: Random, scene: Scene) -> Turn:
    r = rng.randrange(3)
    question = rng.choice(
        (f"What is in the {ROWS[r]} row?", f"Which things does the {ROWS[r]} row hold?")
    )
    return Turn(question, phrases.row_answer(scene, r))


def _ask_column(rng: Random, scene: Scene) -> Turn:
    c = rng.randrange(3)
    question = rng.choice(
        (f"What is in the {COLS[c]} column?", f"Which things does the {COLS[c]} column hold?")
    )
    return Turn(question, phrases.column_answer(scene, c))


SCENE_QUESTIONS = (_ask_cell, _ask_place, _ask_row, _ask_column)


@family("general_vqa")
def general_vqa(rng: Random) -> Dialogue:
    """One question about a scene."""
    scene = random_scene(rng)
    return Dialogue(scene, (rng.choice(SCENE_QUESTIONS)(rng, scene),))


@family("text_vqa")
def text_vqa(rng: Random) -> Dialogue:
    """Transcribe a sign, or one of its lines."""
    sign = random_sign(rng)
    if rng.random() < 0.6:
        question = rng.choice(
            ("What does the sign say?", "Read the text in the picture.", "Transcribe the sign.")
        )
        return Dialogue(sign, (Turn(question, phrases.sign_answer(sign)),))
    i = rng.randrange(3)
    question = rng.choice(
        (f"What is written on the {ORDINALS[i]} line?", f"Read the {ORDINALS[i]} line of the sign.")
    )
    return Dialogue(sign, (Turn(question, phrases.line_answer(sign, i)),))


@family("captioning")
def captioning(rng: Random) -> Dialogue:
    """Describe a scene cell by cell."""
    scene = random_scene(rng)
    if rng.random() < 0.7:
        question = rng.choice(
            ("Describe the picture.", "Describe this image in detail.", "What do you see?")
        )
        return Dialogue(scene, (Turn(question, phrases.caption(scene)),))
    question = rng.choice(
        ("Describe the picture column by column.", "Go through the columns and describe them.")
    )
    return Dialogue(scene, (Turn(question, phrases.column_caption(scene)),))


@family("charts")
def charts(rng: Random) -> Dialogue:
    """Read out a bar chart or a table."""
    if rng.random() < 0.6:
        chart = random_chart(rng)
        question = rng.choice(
            ("Read out the chart.", "What does the bar chart show?", "List the values of the bars.")
        )
        return Dialogue(chart, (Turn(question, phrases.chart_answer(chart)),))
    table = random_table(rng)
    question = rng.choice(
        ("Read out the table.", "What does the table say?", "List the values in the table.")
    )
    return Dialogue(table, (Turn(question, phrases.table_answer(table)),))


@family("reasoning")
def reasoning(rng: Random) -> Dialogue:
    """Count or compare step by step."""
    scene = random_scene(rng)
    kind = rng.randrange(3)
    if kind == 0:
        shape = rng.choice([thing.shape for _, _, thing in scene.things()])
        question = f"How many {phrases.plural(shape)} are there? Think step by step."
        return Dialogue(scene, (Turn(question, phrases.count_shape(scene, shape)),))
    if kind == 1:
        color = rng.choice([thing.color for _, _, thing in scene.things()])
        question = f"How many things are {color}? Think step by step."
        return Dialogue(scene, (Turn(question, phrases.count_color(scene, color)),))
    first, second = rng.sample(SHAPES, 2)
    question = (
        f"Are there more {phrases.plural(first)} than {phrases.plural(second)}? Think step by step."
    )
    return Dialogue(scene, (Turn(question, phrases.compare_shapes(scene, first, second)),))


@family("multi_turn")
def multi_turn(rng: Random) -> Dialogue:
    """Two different questions about one scene."""
    scene = random_scene(rng)
    asked = rng.sample(SCENE_QUESTIONS, 2)
    return Dialogue(scene, tuple(ask(rng, scene) for ask in asked))


def _chat_sum(rng: Random) -> Turn:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    question = rng.choice((f"What is {a} plus {b}?", f"Please add {a} and {b}."))
    return Turn(question, phrases.sum_answer(a, b))


def _chat_spell(rng: Random) -> Turn:
    word = rng.choice(WORDS)
    question = rng.choice((f"How do you spell {word}?", f"Spell the word {word}, please."))
    return Turn(question, phrases.spell_answer(word))


def _chat_count(rng: Random) -> Turn:
    end = rng.randint(3, 9)
    return Turn(f"Please count to {end}.", phrases.count_answer(end))


def _chat_color(rng: Random) -> Turn:
    color = rng.choice(COLOR_NAMES)
    return Turn(f"What can you tell me about the color {color}?", phrases.color_answer(color))


def _chat_about(rng: Random) -> Turn:
    question, answer = rng.choice(tuple(phrases.SMALL_TALK.items()))
    return Turn(question, answer)


CHAT_TOPICS = (_chat_sum, _chat_spell, _chat_count, _chat_color, _chat_about)


@family("text_chat")
def text_chat(rng: Random) -> Dialogue:
    """Text only."""
    return Dialogue(None, (rng.choice(CHAT_TOPICS)(rng),))
