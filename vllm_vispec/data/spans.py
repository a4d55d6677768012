"""Which tokens of a rendered dialogue the assistant wrote, before images are expanded.

The dialogue is rendered once; an answer starts where the rendering of everything before it (with
the opening of an answer) ends. A template for which that is no prefix of the whole, in text or in
tokens, does not round-trip: what it would be trained on is not what the engine sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from vllm_vispec.data.template import ChatTemplate
from vllm_vispec.data.types import ANSWER_TOKENS_KEY, FINISH_KEY, Conversation, Turn


class RoundTripError(ValueError):
    """The chat template does not give back what went in."""


@dataclass(frozen=True)
class PlainSample:
    """A dialogue with one token per image: ids, answer marks, and the text it was asked with."""

    token_ids: list[int]
    answer: list[bool]
    prompt_text: str


def plain_sample(template: ChatTemplate, conversation: Conversation, recorded: bool) -> PlainSample:
    """Return the tokens of a dialogue up to its last answer.

    Raises:
        RoundTripError: the template does not keep a prefix a prefix.
        ValueError: there is no answer, an empty one, or the record contradicts the dialogue.
    """
    turns = _until_last_answer(conversation)
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    tokens = recorded_answer(conversation, len(answers)) if recorded else None
    cut = _cut_off(conversation, len(answers))
    prompt_text = template.render(turns[:-1], open_answer=True)
    text = prompt_text if tokens else template.render(turns)
    ids = template.tokenize(text)
    marks = [False] * len(ids)
    end = len(ids)
    for number, index in enumerate(answers[:-1] if tokens else answers):
        start, end = _span(template, turns, index, text, ids)
        if end < len(ids) and template.ends_turn(ids[end]) and not cut[number]:
            end += 1
        marks[start:end] = [True] * (end - start)
    if tokens:
        return PlainSample(ids + tokens, marks + [True] * len(tokens), prompt_text)
    return PlainSample(ids[:end], marks[:end], prompt_text)


def recorded_answer(conversation: Conversation, answers: int) -> list[int] | None:
    """Return the recorded ids of the last answer, None if the record has none.

    Raises:
        ValueError: the record is not one non-empty list of ids per answer.
    """
    found = conversation.extra.get(ANSWER_TOKENS_KEY)
    if not found:
        return None
    if not isinstance(found, list) or len(found) != answers:
        raise ValueError(f"{ANSWER_TOKENS_KEY} is not one list for each of {answers} answers")
    if found[-1] is None:
        return None
    if not _is_id_list(found[-1]):
        raise ValueError(f"{ANSWER_TOKENS_KEY} holds no token ids for the last answer")
    return list(found[-1])


def _is_id_list(found: Any) -> bool:
    return bool(found) and isinstance(found, list) and all(type(item) is int for item in found)


def _until_last_answer(conversation: Conversation) -> tuple[Turn, ...]:
    """Return the turns up to the last answer: later ones teach nothing."""
    turns = conversation.turns
    while turns and turns[-1].role != "assistant":
        turns = turns[:-1]
    if not turns:
        raise ValueError("no answer")
    if all(turn.role != "user" for turn in takewhile(lambda turn: turn.role != "assistant", turns)):
        raise ValueError("an answer without a question before it")
    for turn in turns:
        if turn.role != "assistant":
            continue
        if any(part.image for part in turn.parts):
            raise ValueError("an answer holds an image")
        if not turn.text.strip():
            raise ValueError("empty answer")
    if any(part.image for turn in conversation.turns[len(turns) :] for part in turn.parts):
        raise ValueError("an image without an answer after it")
    return turns


def _cut_off(conversation: Conversation, answers: int) -> list[bool]:
    """Return, for each answer, whether the token limit ended it."""
    reasons = conversation.extra.get(FINISH_KEY)
    if not isinstance(reasons, list) or len(reasons) != answers:
        return [False] * answers
    return [reason == "length" for reason in reasons]


def _span(
    template: ChatTemplate, turns: Sequence[Turn], index: int, text: str, ids: list[int]
) -> tuple[int, int]:
    """Return the tokens [start, end) of an answer, without what closes the turn."""
    prefix = template.render(turns[:index], open_answer=True)
    if not text.startswith(prefix):
        raise RoundTripError(f"chat template: the text before turn {index} is no prefix")
    before = template.tokenize(prefix)
    if ids[: len(before)] != before:
        raise RoundTripError(f"chat template: the tokens before turn {index} are no prefix")
    end = _answer_end(text, len(prefix), turns[index].text)
    pairs = zip(ids, template.tokenize(text[:end]), strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if shared <= len(before):
        raise RoundTripError(f"chat template: the answer in turn {index} has no token of its own")
    return len(before), shared


def _answer_end(text: str, start: int, answer: str) -> int:
    """Return the character after the answer; templates may strip it."""
    for wanted in (answer, answer.strip()):
        found = text.find(wanted, start)
        # Only white space may stand between the opening and the answer.
        if found >= 0 and not text[start:found].strip():
            return found + len(wanted)
    raise RoundTripError("chat template: it changes the text of an answer")
