"""Prompt styles: what is added to a question so that the target answers at length.

A draft head learns from the target's own words, and there are few of them in a one-word answer;
ViSpec asks for at least 1000 words (arXiv 2509.15235, training data).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vllm_vispec.data.types import Part, Turn


@dataclass(frozen=True)
class PromptStyle:
    """``request`` is added to every question as a sentence of its own; "" leaves it alone."""

    request: str


PROMPT_STYLES: Mapping[str, PromptStyle] = MappingProxyType(
    {
        "none": PromptStyle(""),
        "long": PromptStyle("Answer at length, with at least 1000 words."),
        "detailed": PromptStyle("Answer in detail and mention everything you see."),
        "reasoning": PromptStyle("Think step by step and write every step down."),
    }
)


def ask(turns: tuple[Turn, ...], request: str) -> tuple[Turn, ...]:
    """Return the turns before an answer with the request added to the last question."""
    if not request:
        return turns
    last = max(i for i, turn in enumerate(turns) if turn.role == "user")
    parts = turns[last].parts
    gap = "\n" if parts and parts[-1].text else ""
    asked = Turn("user", _with_text(parts, gap + request))
    return (*turns[:last], asked, *turns[last + 1 :])


def _with_text(parts: tuple[Part, ...], text: str) -> tuple[Part, ...]:
    if parts and parts[-1].image is None:
        return (*parts[:-1], Part(text=parts[-1].text + text))
    return (*parts, Part(text=text))


def question_groups(turns: tuple[Turn, ...]) -> list[tuple[Turn, ...]]:
    """Split a dialogue into what stands before each answer; the answers themselves are dropped.

    Raises:
        ValueError: nobody asks anything.
    """
    groups: list[list[Turn]] = [[]]
    for turn in turns:
        if turn.role != "assistant":
            groups[-1].append(turn)
        elif any(item.role == "user" for item in groups[-1]):
            groups.append([])
    asked = [tuple(group) for group in groups if any(turn.role == "user" for turn in group)]
    if not asked:
        raise ValueError("no question")
    return asked
