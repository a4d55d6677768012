"""Child process of the simulation test: one engine, its answers as a file, the simulation of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from examples.pair import DEFAULT_DRAFT_MODEL, DEFAULT_MODEL
from examples.tiny_vlm.dataset import Sample, make_sample
from examples.tiny_vlm.families import FAMILIES
from vllm_vispec.data.encode import Encoder
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import Part, Turn
from vllm_vispec.evaluate.engine import (
    Answer,
    EngineSettings,
    Question,
    ask,
    open_engine,
    summarise,
)
from vllm_vispec.evaluate.options import EvalOptions
from vllm_vispec.evaluate.report import Report
from vllm_vispec.evaluate.run import evaluate

FIRST_HELDOUT = 700_000
MAX_TOKENS = 160


@dataclass
class Dialogue:
    """A dialogue under way; the engine's answers replace the reference ones."""

    family: str
    sample: Sample
    image: str | None
    turns: list[Turn] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)

    def ask_next(self, encoder: Encoder) -> Question | None:
        """The next question, None after the last."""
        number = len(self.token_ids)
        if number == len(self.sample.dialogue.turns):
            return None
        parts = [Part(text=self.sample.dialogue.turns[number].question)]
        if number == 0 and self.image is not None:
            parts.insert(0, Part(image=self.image))
        self.turns.append(Turn("user", tuple(parts)))
        images = () if self.image is None else (self.image,)
        ids = encoder.prompt_ids(self.turns)
        return Question(self.family, ids, images, [0] * MAX_TOKENS)

    def take(self, answer: Answer, text: str) -> None:
        """Append the engine's answer."""
        self.turns.append(Turn("assistant", (Part(text=text),)))
        self.token_ids.append(list(answer.token_ids))

    def record(self, name: str) -> dict[str, Any]:
        """The dialogue as a record of an OpenAI style file."""
        messages = [
            {
                "role": turn.role,
                "content": [
                    {"type": "image", "image": part.image}
                    if part.image
                    else {"type": "text", "text": part.text}
                    for part in turn.parts
                ],
            }
            for turn in self.turns
        ]
        return {
            "id": name,
            "family": self.family,
            "messages": messages,
            "response_token_ids": self.token_ids,
        }


def dialogues(folder: Path, per_family: int) -> list[Dialogue]:
    """Held-out samples with their images as files."""
    made = []
    for family in FAMILIES:
        for index in range(per_family):
            sample = make_sample("heldout", FIRST_HELDOUT + index, family)
            image = None
            if sample.canvas is not None:
                image = f"{family}-{index}.png"
                sample.canvas.image.save(folder / image)
            made.append(Dialogue(family, sample, image))
    return made


def _answer_all(
    settings: EngineSettings, items: Sequence[Dialogue], encoder: Encoder, folder: Path
) -> list[tuple[Question, Answer]]:
    done: list[tuple[Question, Answer]] = []
    with open_engine(settings) as llm:
        tokenizer = llm.get_tokenizer()
        while True:
            asked = [(item, item.ask_next(encoder)) for item in items]
            due = [(item, question) for item, question in asked if question is not None]
            if not due:
                return done
            answers = ask(llm, [question for _, question in due], folder)
            for (item, question), answer in zip(due, answers, strict=True):
                item.take(answer, tokenizer.decode(answer.token_ids, skip_special_tokens=True))
                ids = list(answer.token_ids)
                done.append((replace(question, answer_ids=ids), answer))


def simulate_and_measure(folder: str, num_draft_tokens: int, per_family: int = 2) -> dict[str, Any]:
    """Both measurements on the engine's own answers, as plain data."""
    root = Path(folder)
    settings = EngineSettings(DEFAULT_MODEL, DEFAULT_DRAFT_MODEL, num_draft_tokens, "float32", 1024)
    items = dialogues(root, per_family)
    encoder = Encoder(load_processor(DEFAULT_MODEL), 1024, root)
    done = _answer_all(settings, items, encoder, root)
    data = root / "answers.jsonl"
    data.write_text(
        "".join(json.dumps(item.record(f"s{i}")) + "\n" for i, item in enumerate(items))
    )
    report: Report = evaluate(
        EvalOptions(
            target=DEFAULT_MODEL,
            head=DEFAULT_DRAFT_MODEL,
            data=data,
            num_speculative_tokens=num_draft_tokens,
            check_greedy=True,
        )
    )
    engine = summarise([q for q, _ in done], [a for _, a in done], num_draft_tokens)
    found = replace(report, engine=engine).to_json()
    return {
        "simulated": found["simulated"],
        "engine": found["engine"]["families"],
        "greedy_share": found["greedy_share"],
        "rejected": found["rejected"],
        "past_end": found["engine"]["accepted_past_end"],
    }
