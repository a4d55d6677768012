"""Write samples as a conversation file for `vispec`: `python -m examples.tiny_vlm.questions`.

The answers in the file are short, as in most public image question sets: the words of an answer
that depend on the image, or its first sentence. `vispec regenerate` replaces them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .dataset import SLOT, Sample, make_sample, strip_marks
from .families import FAMILIES

TEXT_FAMILY = "text_chat"
IMAGE_FAMILIES = tuple(name for name in FAMILIES if name != TEXT_FAMILY)


def short_answer(marked: str) -> str:
    """What a terse annotator writes down."""
    words = SLOT.findall(marked)
    return " ".join(words) if words else strip_marks(marked).split(". ")[0]


def record(sample: Sample, name: str, image: str | None, whole: bool = False) -> dict[str, Any]:
    """One dialogue in OpenAI style.

    Args:
        image: path of its picture in the file, None if it has none.
        whole: With the whole answers, not the short ones.
    """
    answered = strip_marks if whole else short_answer
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(sample.dialogue.turns):
        content: list[dict[str, str]] = [{"type": "text", "text": turn.question}]
        if number == 0 and image:
            content.insert(0, {"type": "image", "image": image})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": answered(turn.answer)})
    return {"id": name, "family": sample.family, "messages": messages}


def write_questions(
    folder: Path,
    split: str,
    start: int,
    count: int,
    families: Sequence[str],
    whole: bool = False,
) -> Path:
    """Write `count` samples, the families in turns, with their pictures; returns the file.

    Args:
        start: first index in the split.
        whole: see `record`.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    file, lines = folder / "questions.jsonl", []
    for number in range(count):
        index = start + number
        sample = make_sample(split, index, families[number % len(families)])
        image = None if sample.canvas is None else f"images/{index}.png"
        if sample.canvas is not None:
            sample.canvas.image.save(folder / str(image))
        lines.append(json.dumps(record(sample, f"{split}-{index}", image, whole)))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def main(
    output: Annotated[Path, typer.Option(help="Folder for questions.jsonl and images/.")],
    count: Annotated[int, typer.Option(min=1, help="Samples.")] = 1536,
    split: Annotated[str, typer.Option(help="train or heldout.")] = "train",
    start: Annotated[int, typer.Option(min=0, help="First index in the split.")] = 30_000_000,
    family: Annotated[list[str] | None, typer.Option(help="Only these task families.")] = None,
) -> None:
    """Write questions of the tiny world."""
    file = write_questions(output, split, start, count, family or tuple(FAMILIES))
    print(f"{count} questions: {file}")


if __name__ == "__main__":
    typer.run(main)
