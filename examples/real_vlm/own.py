"""What SmolLM2 itself writes: `python -m examples.real_vlm.own`.

Its chats, sampled at temperature 1, keep the target's text as it was. Its sentences and stories
about things are the free English of answers about images, at 0.7: at 1 so small a model rambles.
What names a thing that is not there is left out.
Resumable: it comes in parts, and the same command samples those that are missing.
"""

from __future__ import annotations

import re
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

from vllm_vispec.utils.files import write_json

from .build import SYSTEM
from .pictures import PICTURES
from .words import listing, plural

USER, END = "<|im_start|>user\n", "<|im_end|>\n"
STORIES = {
    "Write a short story about the things in the picture.": "Write a short story about {}.",
    "Make up a short story for children from this image.": "Write a story for children about {}.",
    "Invent a scene of a film with what you see here.": "Write a scene of a film with {}.",
    "How could one use the things in the picture together?": "How could one use {} together?",
    "Write a letter to a friend about what you see.": "Write a letter to a friend about {}.",
    "What do the things in this picture have in common?": "What do {} have in common?",
    "Write an advertisement for the things shown here.": "Write an advertisement for {}.",
    "Write a poem about this picture.": "Write a poem about {}.",
}
ABOUT = (
    "Tell me something about the {} in one sentence.",
    "What is a {}? Answer in one sentence.",
    "Where does one find a {}? Answer in one sentence.",
    "Why do people like a {}? Answer briefly.",
)
_SENTENCE = re.compile(r"[^.!?]+[.!?]")


def prompt(question: str) -> str:
    """The chat prompt of one question."""
    return f"<|im_start|>system\n{SYSTEM}{END}{USER}{question}{END}<|im_start|>assistant\n"


def named(text: str) -> set[str]:
    """Things that a text names, singular or plural."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return {name for name in PICTURES if name in words or plural(name) in words}


class Writer:
    """SmolLM2 in vLLM."""

    def __init__(self, model: Path) -> None:
        from vllm import LLM

        self.llm = LLM(model=str(model), max_model_len=1024, enforce_eager=True, max_num_seqs=48)

    def sample(
        self, prompts: list[str], limit: int, seed: int, temperature: float = 0.7
    ) -> list[tuple[str, bool]]:
        """One text a prompt, and whether it ended by itself within the limit."""
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=temperature, max_tokens=limit, seed=seed + i)
            for i in range(len(prompts))
        ]
        found = [one.outputs[0] for one in self.llm.generate(prompts, params)]
        return [(one.text, one.finish_reason == "stop") for one in found]

    def about(self, ask: str, seed: int) -> dict[str, list[str]]:
        """Sentences, one a thing at most, that name the thing and no other."""
        texts = self.sample([prompt(ask.format(name)) for name in PICTURES], 60, seed)
        kept: dict[str, list[str]] = {name: [] for name in PICTURES}
        for name, (text, _) in zip(PICTURES, texts, strict=True):
            first = _SENTENCE.match(text.strip())
            if first and named(first[0]) == {name} and 30 < len(first[0]) < 220:
                kept[name].append(first[0].strip())
        return kept

    def stories(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Texts that name the two or three things they are asked about, and no other."""
        rng, asked = Random(seed), []
        for _ in range(count):
            names = rng.sample(list(PICTURES), rng.choice((2, 2, 3)))
            question, own = rng.choice(list(STORIES.items()))
            asked.append((names, question, own.format(listing([f"the {n}" for n in names]))))
        texts = self.sample([prompt(own) for *_, own in asked], 260, seed)
        return [
            {"names": names, "question": question, "answer": text, "whole": whole}
            for (names, question, _), (text, whole) in zip(asked, texts, strict=True)
            if set(names) == named(text)
        ]

    def chats(self, count: int, seed: int) -> list[tuple[str, str, bool]]:
        """Questions that the model asks itself, its answers, and whether they are whole."""
        start = f"<|im_start|>system\n{SYSTEM}{END}{USER}"
        asked = self.sample([start] * count, 80, seed, 1.0)
        questions = [text for text, whole in asked if whole and len(text) > 12]
        answers = self.sample([prompt(q) for q in questions], 300, seed + count, 1.0)
        return [(q, *answer) for q, answer in zip(questions, answers, strict=True) if answer[0]]


def main(
    model: Annotated[Path, typer.Option(help="Folder of the target before training.")],
    output: Annotated[Path, typer.Option(help="Folder for the parts.")],
    parts: Annotated[int, typer.Option(help="Parts to have in the end.")] = 12,
    stories: Annotated[int, typer.Option(help="Stories to sample a part.")] = 220,
    chats: Annotated[int, typer.Option(help="Chats to sample a part.")] = 250,
) -> None:
    """Sample the parts that are missing."""
    todo = [i for i in range(parts) if not (output / f"part-{i}.json").is_file()]
    if todo:
        writer = Writer(model)
    for i in todo:
        seed = 10**6 * (i + 1)
        part = {
            "about": writer.about(ABOUT[i % len(ABOUT)], seed),
            "stories": writer.stories(stories, seed + 10**5),
            "chats": writer.chats(chats, seed + 2 * 10**5),
        }
        write_json(output / f"part-{i}.json", part)


if __name__ == "__main__":
    typer.run(main)
