"""Held-out samples for the demo and the benchmark."""

from __future__ import annotations

from collections.abc import Iterator
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
        images = iter(self.images)

        def content(part: dict) -> dict:
            if part["type"] != "image":
                return part
            return {"type": "image_pil", "image_pil": next(images)}

        return [m | {"content": [content(part) for part in m["content"]]} for m in self.messages]


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
