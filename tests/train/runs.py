"""Conversation files for the tests of training, recipes that train on them, and what runs leave."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from random import Random
from typing import Any

from tests.support.tiny_models import random_image
from vllm_vispec.train.config import TrainConfig, config_from_flat
from vllm_vispec.train.distributed import processes
from vllm_vispec.train.loop import Outcome, train
from vllm_vispec.train.trainer import StepResult, Trainer

WORDS = ("the", "cat", "sees", "a", "red", "ball", "and", "two", "blue", "boxes", "near", "trees")


def write_dialogues(folder: Path, count: int, seed: int = 0) -> Path:
    """Write `count` OpenAI-style dialogues with 0, 1 or 2 images each; returns the file."""
    random = Random(seed)
    records = [_record(folder, index, random) for index in range(count)]
    return write_records(folder / "data.jsonl", records)


def write_records(file: Path, records: list[dict[str, Any]]) -> Path:
    """Write records as JSON lines."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def _record(folder: Path, index: int, random: Random) -> dict[str, Any]:
    images = [f"{index}-{number}.png" for number in range(index % 3)]
    for number, name in enumerate(images):
        size = (56 + 28 * (index % 2), 56 + 28 * number)
        random_image(10 * index + number, size).save(folder / name)
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": name}} for name in images
    ]
    content.append({"type": "text", "text": _text(random, 4)})
    return {
        "id": f"sample-{index}",
        "family": "pictures" if images else "chat",
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": _text(random, 6 + index % 5)},
        ],
    }


def _text(random: Random, words: int) -> str:
    return " ".join(random.choices(WORDS, k=words))


def recipe(target: str | Path, data: Path, output: Path, **changes: Any) -> TrainConfig:
    """A recipe of a few seconds; changes as `section__name=value`."""
    flat: dict[str, Any] = {
        "target.model": str(target),
        "target.dtype": "float32",
        "data.train": str(data),
        "data.validation_share": 0.2,
        "data.workers": 0,
        "head.dtype": "float32",
        "optimizer.lr": 1e-3,
        "schedule.epochs": 0,
        "schedule.max_steps": 6,
        "batch.size": 4,
        "run.output": str(output),
        "run.device": "cpu",
        "run.log_every": 1,
        "run.validate_every": 0,
        "run.save_every": 0,
        "run.num_draft_tokens": 3,
    }
    named = {name.replace("__", ".", 1): value for name, value in changes.items()}
    return config_from_flat(flat | named)


def run(config: TrainConfig, *override: str) -> Outcome:
    """Train in this process."""
    with processes("cpu") as group:
        return train(config, group, override)


def run_and_signal(flat: dict[str, Any], at_step: int, signal_name: str) -> dict[str, Any]:
    """Train, and get a signal while step `at_step` (from 1) is computed."""
    original = Trainer.step

    def step(
        self: Trainer, passes: Any, number: int, lr: float, progress: float = 0.0
    ) -> StepResult:
        if number + 1 == at_step:
            os.kill(os.getpid(), getattr(signal, signal_name))
        return original(self, passes, number, lr, progress)

    Trainer.step = step  # type: ignore[method-assign]
    try:
        outcome = run(config_from_flat(flat))
    finally:
        Trainer.step = original  # type: ignore[method-assign]
    return {"finished": outcome.finished, "step": outcome.step, "message": outcome.message}


def lines(output: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl."""
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def losses(output: Path) -> dict[int, float]:
    """Loss of every logged step of a run."""
    return {line["step"]: line["loss"] for line in lines(output)}
