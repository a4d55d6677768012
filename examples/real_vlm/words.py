"""Sentences with alternatives, from `phrases.yaml`, and a little grammar."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import yaml

PHRASES: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "phrases.yaml").read_text())
WORDS: dict[str, list[str]] = {kind: text.split() for kind, text in PHRASES["words"].items()}
CHARTS = {title: (names.split(), unit) for title, (names, unit) in PHRASES["charts"].items()}
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_SAME = ("sheep", "fish", "deer", "grapes", "scissors", "glasses", "money", "bread")
_SOME = ("grapes", "scissors", "glasses", "money", "bread", "milk", "corn", "honey", "fire")


def choose(rng: Random, name: str) -> str:
    """One line of a phrase, given by its name (`chart.top`)."""
    found: Any = PHRASES
    for part in name.split("."):
        found = found[part]
    return found if isinstance(found, str) else rng.choice(found)


def fill(rng: Random, line: str, **slots: object) -> str:
    """Expand `[a|b]`, innermost first, then the slots; sentences after the first get a capital."""
    while found := _CHOICE.search(line):
        choice = rng.choice(found[1].split("|"))
        line = line[: found.start()] + choice + line[found.end() :]
    text = " ".join(line.format(**slots).split()).replace(" .", ".")
    return re.sub(r"(?<=[.!?] )[a-z]", lambda found: found[0].upper(), text)


def say(rng: Random, name: str, **slots: object) -> str:
    """A phrase by its name, filled."""
    return fill(rng, choose(rng, name), **slots)


def at(rng: Random, place: str) -> str:
    """A place as a part of a sentence; the place itself stays one phrase (`top left`)."""
    return say(rng, "at_center") if place == "center" else say(rng, "at", place=place)


def number(count: int) -> str:
    """A count as a word, up to ten."""
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def plural(name: str) -> str:
    """Plural of a thing's name."""
    if name in _SAME:
        return name
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    if name in ("wolf", "leaf"):
        return f"{name[:-1]}ves"
    if name == "mouse":
        return "mice"
    return f"{name}{'es' if name.endswith(('s', 'x', 'ch', 'sh')) else 's'}"


def a(name: str) -> str:
    """A thing's name with its article."""
    if name in _SOME:
        return f"some {name}"
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def listing(items: list[str]) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def sentence(rng: Random) -> str:
    """A sentence for a document, without punctuation."""
    words = {kind: rng.choice(WORDS[kind]) for kind in ("who", "what", "where", "verb", "day")}
    one, two = rng.sample(WORDS["adjective"], 2)
    return say(rng, "sentence", **words, one=one, two=two, count=rng.randint(2, 99))


def names_content(pieces: Sequence[str], shown: Collection[str]) -> list[bool]:
    """Which tokens of an answer belong to a word that its images show, or to a number.

    Args:
        pieces: the text of every token.
        shown: words in lower case, see `questions.shown_words`.
    """
    text = "".join(pieces)
    named = [False] * len(text)
    for found in re.finditer(r"[A-Za-z]+|[0-9]+", text):
        word = found[0].lower()
        # "one" and "no" mostly count nothing.
        if word.isdigit() or word in shown or word in NUMBERS[2:]:
            named[found.start() : found.end()] = [True] * len(word)
    ends = accumulate(map(len, pieces))
    return [any(named[end - len(one) : end]) for one, end in zip(pieces, ends, strict=True)]
