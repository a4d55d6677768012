"""The built-in questions: images that Pillow draws, the same everywhere, and text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    Size = tuple[int, int]

COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd")
_SIGN = (
    ".........",
    ".###.###.",
    "...#...#.",
    ".###..#..",
    ".#....#..",
    ".###..#..",
)
LONG_TEXT = " ".join(
    f"On day {day} the ship had {7 * day % 31 + 2} crates of tea and {5 * day % 23 + 1} of salt."
    for day in range(1, 11)
)


@dataclass(frozen=True)
class Prompt:
    """A question.

    Attributes:
        name: on the page.
        text: behind the images.
        pictures: what is drawn, and how large.
    """

    name: str
    text: str
    pictures: tuple[tuple[Callable[[Size], Image], Size], ...] = ()

    def messages(self) -> list[dict[str, Any]]:
        """Return the conversation for `vllm.LLM.chat`."""
        content: list[dict[str, Any]] = [
            {"type": "image_pil", "image_pil": draw(size)} for draw, size in self.pictures
        ]
        content.append({"type": "text", "text": self.text})
        return [{"role": "user", "content": content}]


def draw_shapes(size: Size) -> Image:
    """A red circle, a blue square and a green triangle."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", size, "white")
    pen, (width, height) = ImageDraw.Draw(image), size
    side = min(width, height) // 3
    pen.ellipse((side // 4, side // 4, side + side // 4, side + side // 4), fill=COLOURS[0])
    pen.rectangle((width - side - 4, 8, width - 4, side + 8), fill=COLOURS[1])
    middle, bottom = width // 2, height - 6
    corners = (middle, bottom - side), (middle - side // 2, bottom), (middle + side // 2, bottom)
    pen.polygon(corners, fill=COLOURS[2])
    return image


def draw_chart(size: Size) -> Image:
    """Five bars."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", size, "#f4f4f4")
    pen, (width, height) = ImageDraw.Draw(image), size
    step = width // (len(COLOURS) + 1)
    for place, colour in enumerate(COLOURS):
        left, bar = step // 2 + place * step, height * (3 + 5 * place % 7) // 10
        pen.rectangle((left, height - bar, left + step * 2 // 3, height - 2), fill=colour)
    return image


def draw_gradient(size: Size) -> Image:
    """Red from left to right, blue from top to bottom; no edge anywhere."""
    from PIL import Image

    across, down = Image.linear_gradient("L").rotate(90).resize(size), Image.linear_gradient("L")
    return Image.merge("RGB", (across, Image.new("L", size, 96), down.resize(size)))


def draw_sign(size: Size) -> Image:
    """The number 27 in white blocks on a dark ground."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", size, "#203040")
    pen, block = ImageDraw.Draw(image), size[0] // 9
    for row, marks in enumerate(_SIGN):
        for column, mark in enumerate(marks):
            left, top = column * block, row * block
            if mark == "#":
                pen.rectangle((left, top, left + block - 1, top + block - 1), fill="white")
    return image


PROMPTS: tuple[Prompt, ...] = (
    Prompt("text, short", "What is the capital of France?"),
    Prompt("text, long", f"{LONG_TEXT} On which day were there most crates? Answer step by step."),
    Prompt("shapes, 336 x 336", "Describe the image.", ((draw_shapes, (336, 336)),)),
    Prompt("chart, wide", "Which bar is the tallest?", ((draw_chart, (560, 224)),)),
    Prompt("gradient, small", "What colours do you see?", ((draw_gradient, (112, 112)),)),
    Prompt("sign, tall", "Which number is on the sign?", ((draw_sign, (224, 448)),)),
    Prompt(
        "two images",
        "What differs between the two images?",
        ((draw_shapes, (280, 280)), (draw_chart, (336, 196))),
    ),
    Prompt(
        "three images",
        "List what is in each image.",
        ((draw_sign, (196, 196)), (draw_gradient, (252, 140)), (draw_shapes, (140, 252))),
    ),
)
