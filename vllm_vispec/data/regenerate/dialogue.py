"""One dialogue on its way: which answer is due, what the target said so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from vllm_vispec.data.encode import Encoder, plain_sample
from vllm_vispec.data.template import ChatTemplate
from vllm_vispec.data.types import FINISH_KEY, Conversation, Part, Rejected, Turn


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


Result = Regenerated | Rejected


class Backend(Protocol):
    """Answers conversations; built from the settings, which may take long."""

    def answer(self, conversations: Iterable[Conversation]) -> Iterator[Result]:
        """Yield each conversation's result as soon as it is there, in any order.

        Raises:
            ViSpecError: the backend as a whole cannot go on; everything finished comes before.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


@dataclass
class Dialogue:
    """State of a dialogue: turns so far and the questions to come."""

    source: Conversation
    groups: list[tuple[Turn, ...]]
    turns: tuple[Turn, ...]
    answers: list[Answer] = field(default_factory=list)
    round_trip_reason: str = ""

    @classmethod
    def begin(
        cls, conversation: Conversation, request: Callable[[Sequence[Turn]], str] = lambda _: ""
    ) -> Dialogue:
        """Drop the answers of a conversation and ask its first question.

        Args:
            request: returns what is added to a question, given the turns that end with it.

        Raises:
            ValueError: it has no question.
        """
        groups = [ask(group, request(group)) for group in question_groups(conversation.turns)]
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
        if answer.finish_reason not in ("stop", "length"):
            raise ValueError(f"the answer ended with {answer.finish_reason}")
        if not answer.text.strip():
            raise ValueError("empty answer")
        text, reason = self._fit_text(answer, template)
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
        reason = self.round_trip_reason or _compare(encoder, conversation, last)
        return Regenerated(conversation, tuple(self.answers), not reason, reason)

    def _fit_text(self, answer: Answer, template: ChatTemplate | None) -> tuple[str, str]:
        """Return the text to store, and why the answer's tokens do not come back ("" if they do).

        Templates differ in who writes the space before an answer; the variant whose rendering gives
        the target's own tokens is taken.
        """
        variants = dict.fromkeys((answer.text, answer.text.lstrip(" "), answer.text.strip()))
        if template is None or answer.token_ids is None:
            return answer.text.strip(), ""
        asked = template.tokenize(template.render(self.turns, open_answer=True))
        # How the earlier answers ended does not matter here.
        extra = {FINISH_KEY: ["stop"] * len(self.answers) + [answer.finish_reason]}
        reason = ""
        for text in variants:
            told = Conversation("", (*self.turns, Turn("assistant", (Part(text=text),))), "", extra)
            try:
                ids = plain_sample(template, told, False).token_ids
            except ValueError as error:
                reason = str(error)
                continue
            if ids == asked + _without_hidden_end(template, ids, answer.token_ids):
                return text, ""
            reason = "other tokens for the same text"
        return answer.text, reason


def _without_hidden_end(
    template: ChatTemplate, rendered: Sequence[int], token_ids: Sequence[int]
) -> list[int]:
    """Return an answer's ids without an end-of-turn token that the template does not write."""
    ids = list(token_ids)
    if ids and template.ends_turn(ids[-1]) and rendered[-1] != ids[-1]:
        return ids[:-1]
    return ids


def _compare(encoder: Encoder, conversation: Conversation, last: Answer) -> str:
    """Return why encoding the finished dialogue does not give the engine's tokens ("" if so)."""

    def is_same(found: list[int]) -> bool:
        answer = _without_hidden_end(encoder.template, found, last.token_ids or ())
        return found == [*(last.prompt_token_ids or ()), *answer]

    # The engine has processed the images; where their sizes explain its tokens, once is enough.
    with suppress(ValueError):
        if encoder.counts_by_size and is_same(encoder.ids_by_size(conversation)):
            return ""
    encoded = encoder(conversation)
    if isinstance(encoded, Rejected):
        return encoded.reason
    if is_same(encoded.token_ids.tolist()):
        return ""
    return "the engine's prompt has other tokens than the encoder's"


def ask(turns: tuple[Turn, ...], request: str) -> tuple[Turn, ...]:
    """Return the turns before an answer, with the request added to the last question."""
    if not request:
        return turns
    last = max(i for i, turn in enumerate(turns) if turn.role == "user")
    parts = list(turns[last].parts)
    text = parts.pop().text if parts and parts[-1].image is None else ""
    parts.append(Part(text=f"{text}\n{request}" if text else request))
    return (*turns[:last], Turn("user", tuple(parts)), *turns[last + 1 :])


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
