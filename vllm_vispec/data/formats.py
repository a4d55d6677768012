"""Record formats of conversation files. A new one is one `RecordFormat` in `FORMATS`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

from vllm_vispec.data.types import ROLES, Conversation, Part, Turn

Record = Mapping[str, Any]
IMAGE_MARK = "<image>"
LLAVA_ROLES = MappingProxyType(
    {
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "system": "system",
    }
)


@dataclass(frozen=True)
class RecordFormat:
    """``turns`` raises ValueError with the reason if the record is not well-formed."""

    name: str
    key: str
    turns: Callable[[Record], tuple[Turn, ...]]
    own_keys: tuple[str, ...]


def to_conversation(record: Any, sample_id: str) -> Conversation:
    """Return a record of any known format as a conversation.

    Raises:
        ValueError: with the reason, in one line.
    """
    if not isinstance(record, Mapping):
        raise ValueError("not a JSON object")
    found = next((item for item in FORMATS.values() if item.key in record), None)
    if found is None:
        keys = " or ".join(item.key for item in FORMATS.values())
        raise ValueError(f"the record has no {keys}")
    turns = found.turns(record)
    if not turns:
        raise ValueError("no turns")
    known = {"id", "family", found.key, *found.own_keys}
    extra = {name: value for name, value in record.items() if name not in known}
    family = record.get("family")
    return Conversation(sample_id, turns, str(family) if family else "", extra)


def _llava_turns(record: Record) -> tuple[Turn, ...]:
    """LLaVA: ``conversations`` with from / value, ``<image>`` marks, paths under ``image``."""
    images = _llava_images(record)
    values = [_llava_value(item) for item in _list(record["conversations"], "conversations")]
    marks = sum(text.count(IMAGE_MARK) for _, text in values)
    if images and not marks:
        values = _mark_first_question(values, len(images))
        marks = len(images)
    if marks != len(images):
        raise ValueError(f"{marks} {IMAGE_MARK} marks for {len(images)} images")
    remaining = iter(images)
    turns = []
    for role, text in values:
        count = text.count(IMAGE_MARK)
        turns.append(Turn(role, _split_marks(text, [next(remaining) for _ in range(count)])))
    return tuple(turns)


def _llava_images(record: Record) -> list[str]:
    found = record.get("image", record.get("images"))
    if found is None:
        return []
    images = [found] if isinstance(found, str) else found
    if not isinstance(images, list) or not all(isinstance(item, str) and item for item in images):
        raise ValueError("image is neither a path nor a list of paths")
    return images


def _llava_value(item: Any) -> tuple[str, str]:
    if not isinstance(item, Mapping) or not isinstance(item.get("value"), str):
        raise ValueError("a turn has no text under value")
    role = LLAVA_ROLES.get(str(item.get("from")))
    if role is None:
        raise ValueError(f"unknown speaker {item.get('from')!r}")
    return role, item["value"]


def _mark_first_question(values: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """Put the marks of images that the text does not mention before the first question."""
    for position, (role, text) in enumerate(values):
        if role == "user":
            marked = (role, (IMAGE_MARK + "\n") * count + text)
            return [*values[:position], marked, *values[position + 1 :]]
    raise ValueError("no question for the images")


def _split_marks(text: str, images: list[str]) -> tuple[Part, ...]:
    """Split at the marks; the line break that goes with a mark is the template's business."""
    parts: list[Part] = []
    for piece, image in zip_longest(re.split(rf"\n?{IMAGE_MARK}\n?", text), images):
        parts += [Part(text=piece)] if piece else []
        parts += [Part(image=image)] if image else []
    return tuple(parts)


def _openai_turns(record: Record) -> tuple[Turn, ...]:
    """OpenAI: ``messages`` with role and content, a string or a list of typed parts."""
    return tuple(_openai_turn(item) for item in _list(record["messages"], "messages"))


def _openai_turn(item: Any) -> Turn:
    if not isinstance(item, Mapping) or item.get("role") not in ROLES:
        raise ValueError(f"a message's role is none of {', '.join(ROLES)}")
    content = item.get("content")
    if isinstance(content, str):
        return Turn(item["role"], (Part(text=content),) if content else ())
    parts = tuple(_openai_part(part) for part in _list(content, "content"))
    return Turn(item["role"], parts)


def _openai_part(part: Any) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    read = PART_READERS.get(str(kind))
    if read is None:
        raise ValueError(f"unknown content part {kind!r}")
    value = read(part)
    if not isinstance(value, str) or (kind != "text" and not value):
        raise ValueError(f"a content part of type {kind} without {kind}")
    return Part(text=value) if kind == "text" else Part(image=value)


def _image_url(part: Record) -> Any:
    found = part.get("image_url")
    return found.get("url") if isinstance(found, Mapping) else found


PART_READERS: Mapping[str, Callable[[Record], Any]] = MappingProxyType(
    {
        "text": lambda part: part.get("text"),
        "image": lambda part: part.get("image", part.get("path")),
        "image_url": _image_url,
    }
)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list")
    return value


FORMATS: Mapping[str, RecordFormat] = MappingProxyType(
    {
        "llava": RecordFormat("llava", "conversations", _llava_turns, ("image", "images")),
        "openai": RecordFormat("openai", "messages", _openai_turns, ()),
    }
)
