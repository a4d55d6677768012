"""Conversations with images, independent of the file format they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ANSWER_TOKENS_KEY = "response_token_ids"
"""Key of `Conversation.extra`: the ids the target generated, one list per assistant turn."""
FINISH_KEY = "finish_reason"
"""Key of `Conversation.extra`: why each answer ended, one string per assistant turn."""


@dataclass(frozen=True)
class Part:
    """A piece of text, or an image by its path as written in the file. Exactly one is set."""

    text: str = ""
    image: str | None = None


@dataclass(frozen=True)
class Turn:
    """What one side says; ``role`` is system, user or assistant."""

    role: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """All text of the turn, images left out."""
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True)
class Conversation:
    """A dialogue; ``extra`` holds the other fields of its record as they were."""

    sample_id: str
    turns: tuple[Turn, ...]
    family: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> tuple[str, ...]:
        """Paths of all images in the order of their appearance."""
        return tuple(part.image for turn in self.turns for part in turn.parts if part.image)


@dataclass(frozen=True)
class Rejected:
    """A sample that is left out, and why (one line)."""

    sample_id: str
    reason: str


def to_messages(
    turns: Sequence[Turn], to_image: Callable[[str], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return turns as chat messages; ``to_image`` makes an image's part from its path."""
    return [
        {
            "role": turn.role,
            "content": [
                to_image(part.image) if part.image else {"type": "text", "text": part.text}
                for part in turn.parts
            ],
        }
        for turn in turns
    ]
