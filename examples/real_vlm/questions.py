"""Write questions for `vispec regenerate`: `python -m examples.real_vlm.questions`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_vispec.utils.files import writing

from .measure import HELD_OUT
from .samples import KINDS, Own, Sample, make_sample


def record(sample: Sample, name: str, folder: Path) -> dict[str, Any]:
    """A dialogue in OpenAI style, its images written to `folder`/images."""
    paths: list[str] = []
    for number, canvas in enumerate(sample.images):
        paths.append(f"images/{name}-{number}.png")
        canvas.image.save(folder / paths[-1])
    shown: Iterator[str] = iter(paths)
    messages = sample.messages(len(sample.turns) - 1)
    for message in messages:
        if message["role"] == "user":
            message["content"] = [
                part | {"image": next(shown)} if part["type"] == "image" else part
                for part in message["content"]
            ]
    messages.append({"role": "assistant", "content": sample.turns[-1].answer})
    return {"id": name, "family": sample.kind, "messages": messages}


def main(
    output: Annotated[Path, typer.Option(help="Folder for questions.jsonl and images/.")],
    count: Annotated[int, typer.Option(min=1, help="Dialogues, the kinds in turns.")] = 4000,
    start: Annotated[int, typer.Option(min=0, help="First seed.")] = 2 * HELD_OUT,
    held_out: Annotated[bool, typer.Option(help="Seeds and chats of no training.")] = False,
    own: Annotated[Path, typer.Option(help="Folder that `own` wrote.")] = Path("out/real_vlm/own"),
) -> None:
    """Write questions; the answers in the file are replaced by the target's own."""
    texts = Own.read(own, held_out)
    kinds = [k for k in KINDS if (texts.stories or k != "story") and (texts.chats or k != "chat")]
    (output / "images").mkdir(parents=True, exist_ok=True)
    first = HELD_OUT if held_out else start
    with writing(output / "questions.jsonl") as aside, aside.open("w") as file:
        for number in range(count):
            sample = make_sample(first + number, texts, kinds[number % len(kinds)])
            file.write(json.dumps(record(sample, str(first + number), output)) + "\n")
    print(f"{count} questions: {output / 'questions.jsonl'}")


if __name__ == "__main__":
    typer.run(main)
