"""Held-out samples for the demo and the benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from PIL import Image

from .dataset import make_sample, messages_of, strip_marks
from .families import FAMILIES


@dataclass(frozen=True)
class DemoSample:
    """One held-out request: chat messages, its images, and what a perfect answer says."""

    family: str
    messages: list[dict]
    images: list[Image.Image]
    reference: str

    def chat_messages(self) -> list[dict]:
        """The messages as `LLM.chat` takes them, with the images in their places."""
        return with_images(self.messages, map(image_part, self.images))


def image_part(image: Image.Image) -> dict:
    """An image as `LLM.chat` takes it."""
    return {"type": "image_pil", "image_pil": image}


def with_images(messages: list[dict], parts: Iterable[dict]) -> list[dict]:
    """The messages with these parts, in order, in the places of {"type": "image"}."""
    images = iter(parts)

    def placed(part: dict) -> dict:
        return next(images) if part["type"] == "image" else part

    return [one | {"content": [placed(part) for part in one["content"]]} for one in messages]


def demo_samples(
    per_family: int, families: tuple[str, ...] | None = None, start: int = 100_000
) -> Iterator[DemoSample]:
    """`per_family` samples of every family; messages hold {"type": "image"} placeholders.

    Earlier turns of a multi-turn sample carry their reference answers.
    """
    for name in families or tuple(FAMILIES):
        for i in range(start, start + per_family):
            sample = make_sample("heldout", i, name)
            last = len(sample.dialogue.turns) - 1
            images = [sample.canvas.image] if sample.canvas is not None else []
            reference = strip_marks(sample.dialogue.turns[last].answer)
            yield DemoSample(name, messages_of(sample, last), images, reference)
