"""One dialogue on its way: which answer is due, what the target said so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_vispec.data.encode import Encoded, Encoder
from vllm_vispec.data.spans import plain_sample
from vllm_vispec.data.template import ChatTemplate
from vllm_vispec.data.types import FINISH_KEY, Conversation, Part, Rejected, Turn

ENDS = ("stop", "length")
"""How an answer may end."""


@dataclass(frozen=True)
class Answer:
    """What an engine returned for one turn; a server may keep the token ids to itself."""

    text: str
    finish_reason: str
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Regenerated:
    """A finished dialogue. ``round_trip`` is None where it could not be checked, else whether the
    template gives back the very tokens; ``round_trip_reason`` says why not."""

    conversation: Conversation
    answers: tuple[Answer, ...]
    round_trip: bool | None = None
    round_trip_reason: str = ""


@dataclass
class Dialogue:
    """State of a dialogue: turns so far and the questions to come."""

    source: Conversation
    groups: list[tuple[Turn, ...]]
    turns: tuple[Turn, ...]
    answers: list[Answer] = field(default_factory=list)
    round_trip_reason: str = ""

    @classmethod
    def begin(cls, conversation: Conversation, request: str) -> Dialogue:
        """Drop the answers of a conversation and ask its first question.

        Raises:
            ValueError: it has no question.
        """
        groups = [ask(group, request) for group in question_groups(conversation.turns)]
        return cls(conversation, groups[1:], groups[0])

    @property
    def images(self) -> tuple[str, ...]:
        """Paths of the images up to the current question."""
        return Conversation("", self.turns).images

    def accept(self, answer: Answer, template: ChatTemplate | None) -> bool:
        """Take the answer to the current question; return whether the dialogue is finished.

        Raises:
            ValueError: the answer is empty, or the engine gave up on it.
        """
        if answer.finish_reason not in ENDS:
            raise ValueError(f"the answer ended with {answer.finish_reason}")
        if not answer.text.strip():
            raise ValueError("empty answer")
        text, reason = fit_text(template, self.turns, answer)
        self.round_trip_reason = self.round_trip_reason or reason
        self.answers.append(answer)
        self.turns = (*self.turns, Turn("assistant", (Part(text=text),)))
        if not self.groups:
            return True
        self.turns = (*self.turns, *self.groups.pop(0))
        return False

    def finish(self, encoder: Encoder | None) -> Regenerated:
        """Return the finished dialogue with the round trip checked."""
        reasons = [answer.finish_reason for answer in self.answers]
        conversation = Conversation(
            self.source.sample_id, self.turns, self.source.family, {FINISH_KEY: reasons}
        )
        last = self.answers[-1]
        if encoder is None or last.prompt_token_ids is None or last.token_ids is None:
            return Regenerated(conversation, tuple(self.answers))
        reason = self.round_trip_reason or compare(encoder, conversation, last)
        return Regenerated(conversation, tuple(self.answers), not reason, reason)


def fit_text(
    template: ChatTemplate | None, turns: Sequence[Turn], answer: Answer
) -> tuple[str, str]:
    """Return the text to store for an answer, and why its tokens do not come back ("" if they do).

    Templates differ in who writes the space before an answer; the variant whose rendering gives
    the target's own tokens is taken.
    """
    variants = list(dict.fromkeys((answer.text, answer.text.lstrip(" "), answer.text.strip())))
    if template is None or answer.token_ids is None:
        return variants[-1], ""
    asked = template.tokenize(template.render(turns, open_answer=True))
    reason = ""
    for text in variants:
        told = (*turns, Turn("assistant", (Part(text=text),)))
        extra = _finish_of_last(told, answer)
        try:
            ids = plain_sample(template, Conversation("", told, extra=extra), False).token_ids
        except ValueError as error:
            reason = str(error)
            continue
        if ids == asked + without_hidden_end(template, ids, answer.token_ids):
            return text, ""
        reason = "other tokens for the same text"
    return answer.text, reason


def _finish_of_last(turns: Sequence[Turn], answer: Answer) -> dict[str, Any]:
    """Return the record's field; the earlier answers' ends do not matter here."""
    count = sum(turn.role == "assistant" for turn in turns)
    return {FINISH_KEY: ["stop"] * (count - 1) + [answer.finish_reason]}


def without_hidden_end(
    template: ChatTemplate, rendered: Sequence[int], token_ids: Sequence[int]
) -> list[int]:
    """Return an answer's ids without an end-of-turn token that the template does not write."""
    ids = list(token_ids)
    if ids and template.ends_turn(ids[-1]) and rendered[-1] != ids[-1]:
        return ids[:-1]
    return ids


def compare(encoder: Encoder, conversation: Conversation, last: Answer) -> str:
    """Return why encoding the finished dialogue does not give the engine's tokens ("" if so)."""
    encoded = encoder(conversation)
    if isinstance(encoded, Rejected):
        return encoded.reason
    assert isinstance(encoded, Encoded)
    found = encoded.token_ids.tolist()
    answer = without_hidden_end(encoder.template, found, last.token_ids or ())
    if found == [*(last.prompt_token_ids or ()), *answer]:
        return ""
    return "the engine's prompt has other tokens than the encoder's"


def ask(turns: tuple[Turn, ...], request: str) -> tuple[Turn, ...]:
    """Return the turns before an answer, with the request added to the last question."""
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
