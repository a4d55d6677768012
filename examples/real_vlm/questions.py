"""Write questions for `vispec regenerate`: `python -m examples.real_vlm.questions`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from examples.tiny_vlm.samples import with_images
from vllm_vispec.utils.files import writing

from .samples import HELD_OUT, KINDS, Own, Sample, make_sample
from .words import PHRASES, plural

PROMPTS = {
    "describe": "description",
    "story": "description",
    "scene": "questions",
    "chart": "charts_tables",
    "table": "charts_tables",
    "document": "transcription",
    "turns": "several_turns",
    "two": "two_images",
    "chat": "text",
}
"""The family that a kind of sample has in the file."""
# Words of documents that name nothing.
_FUNCTION = {"the", "on", "was", "in", "is", "at", "my", "we"}


def shown_words(sample: Sample) -> list[str]:
    """Words, in lower case, that the images show or that name what they show."""
    marks = {mark.text.strip() for canvas in sample.images for mark in canvas.marks}
    words = {word for text in marks for word in f"{text} {plural(text)}".lower().split()}
    return sorted(word for word in words - _FUNCTION if word.isalpha())


def record(sample: Sample, name: str, folder: Path) -> dict[str, Any]:
    """A dialogue in OpenAI style, its images written to `folder`/images."""
    parts = []
    for number, canvas in enumerate(sample.images):
        parts.append({"type": "image", "image": f"images/{name}-{number}.png"})
        canvas.image.save(folder / parts[-1]["image"])
    messages = with_images(sample.messages(len(sample.turns) - 1), parts)
    messages.append({"role": "assistant", "content": sample.turns[-1].answer})
    shown = {"family": PROMPTS[sample.kind], "shows": shown_words(sample)}
    return {"id": name, **shown, "messages": messages}


def write_questions(
    folder: Path, own: Own, start: int, count: int, kinds: Sequence[str] = ()
) -> None:
    """Write `questions.jsonl` and `images/`, the kinds in turns.

    Without texts of SmolLM2 there are no stories, and a few open questions are its chats.

    Args:
        start: first seed.
        kinds: of `KINDS`; none: all.
    """
    own = (
        own if own.chats else Own(own.about, own.stories, [(q, "-", True) for q in PHRASES["open"]])
    )
    kinds = [kind for kind in kinds or KINDS if own.stories or kind != "story"]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with writing(folder / "questions.jsonl") as aside, aside.open("w") as file:
        for number in range(count):
            sample = make_sample(start + number, own, kinds[number % len(kinds)])
            file.write(json.dumps(record(sample, str(start + number), folder)) + "\n")


def main(
    output: Annotated[Path, typer.Option(help="Folder for questions.jsonl and images/.")],
    count: Annotated[int, typer.Option(min=1, help="Dialogues, the kinds in turns.")] = 4000,
    start: Annotated[int, typer.Option(min=0, help="First seed.")] = 2 * HELD_OUT,
    held_out: Annotated[bool, typer.Option(help="Seeds and chats of no training.")] = False,
    own: Annotated[Path, typer.Option(help="Folder that `own` wrote.")] = Path("out/real_vlm/own"),
) -> None:
    """Write questions; the answers in the file are replaced by the target's own."""
    write_questions(output, Own.read(own, held_out), HELD_OUT if held_out else start, count)
    print(f"{count} questions: {output / 'questions.jsonl'}")


if __name__ == "__main__":
    typer.run(main)
