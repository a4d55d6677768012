"""Training speed over the batch size, on the shipped pair: `python -m benchmarks.train_speed`.

Both batch sizes train a head of their own on the same samples and take turns in one process.
Tokens are those of the samples, prompts and images included, padding not. With the teacher online
the target's forward pass is part of a step; offline its states come from disk.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.options import ModelOption
from benchmarks.report import write_report
from examples.tiny_vlm.samples import demo_samples
from examples.tiny_vlm.shipped import TARGET
from vllm_vispec.bench.bootstrap import bootstrap
from vllm_vispec.bench.machine import describe_machine
from vllm_vispec.train.config import TrainConfig, config_from_flat
from vllm_vispec.train.data import BatchOrder, Corpus, read_corpus
from vllm_vispec.train.distributed import Processes, processes
from vllm_vispec.train.init import make_draft
from vllm_vispec.train.teacher import Teacher, open_teacher
from vllm_vispec.train.trainer import Trainer

DEFAULT_OUTPUT = Path("benchmarks/results/train_speed.json")
SMALL, LARGE = 1, 8
LR = 1e-4
AUTOCAST = ("off", "bfloat16")


@dataclass(frozen=True)
class Turn:
    """The same samples trained on at both batch sizes: tokens, and seconds by batch size."""

    tokens: int
    seconds: dict[int, float]


def speed(turns: Sequence[Turn], size: int) -> float:
    """Tokens per second over some turns."""
    return sum(turn.tokens for turn in turns) / sum(turn.seconds[size] for turn in turns)


def ratio(turns: Sequence[Turn]) -> float:
    """How many times more tokens per second the large batch trains on."""
    return speed(turns, LARGE) / speed(turns, SMALL)


def write_samples(folder: Path, per_family: int) -> Path:
    """Write dialogues of the tiny world as JSON lines with images beside them."""
    lines = []
    for number, sample in enumerate(demo_samples(per_family)):
        for index, image in enumerate(sample.images):
            image.save(folder / f"{number}-{index}.png")
        names = iter(range(len(sample.images)))
        messages = [
            {**message, "content": _named(message["content"], number, names)}
            for message in sample.messages
        ]
        messages.append({"role": "assistant", "content": sample.reference})
        lines.append({"id": str(number), "family": sample.family, "messages": messages})
    file = folder / "samples.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def _named(content: Any, number: int, names: Any) -> Any:
    if isinstance(content, str):
        return content
    return [
        {"type": "image_url", "image_url": {"url": f"{number}-{next(names)}.png"}}
        if part["type"] == "image"
        else part
        for part in content
    ]


def recipe(model: str, data: Path, mode: str, autocast: str, passes: int) -> TrainConfig:
    """The recipe that is measured."""
    return config_from_flat(
        {
            "target.model": model,
            "data.train": str(data),
            "data.validation_share": 0,
            "teacher.mode": mode,
            "loss.passes": passes,
            "run.output": str(data.parent / mode),
            "run.autocast": autocast,
        }
    )


def measure(config: TrainConfig, turns: int, group: Processes) -> list[Turn]:
    """Let both batch sizes take turns on the same samples."""
    corpus: Corpus = read_corpus(config.data)
    teacher: Teacher = open_teacher(config, corpus, group)
    trainers = {
        size: Trainer(config, make_draft(config.head, teacher.facts, 0), teacher, group)
        for size in (SMALL, LARGE)
    }
    order = BatchOrder(corpus.train, teacher.lengths, config.batch, 1, 0)
    batches = [step[0] for step in order.epoch(0)]
    found: list[Turn] = []
    for number in range(turns + 1):
        samples = batches[number % len(batches)]
        tokens = sum(teacher.lengths[index] for index in samples)
        seconds = {
            size: _train(trainer, samples, size, number) for size, trainer in trainers.items()
        }
        if number:  # the first one warms up
            found.append(Turn(tokens, seconds))
    return found


def _train(trainer: Trainer, samples: Sequence[int], size: int, number: int) -> float:
    pieces = [samples[first : first + size] for first in range(0, len(samples), size)]
    return sum(trainer.step([piece], number, LR).seconds for piece in pieces)


def report(turns: Sequence[Turn]) -> dict[str, Any]:
    """Plain data of one mode."""
    low, high = bootstrap(turns, (0,), lambda drawn: ratio(list(drawn))).tolist()
    return {
        "tokens_per_second": {str(size): round(speed(turns, size), 1) for size in (SMALL, LARGE)},
        "speedup": round(ratio(turns), 3),
        "speedup_interval_95": [round(low, 3), round(high, 3)],
        "turns": len(turns),
        "tokens": sum(turn.tokens for turn in turns),
    }


def main(
    model: ModelOption = TARGET,
    turns: Annotated[int, typer.Option(min=2, help="Batches of 8 per teacher mode.")] = 40,
    per_family: Annotated[int, typer.Option(min=1, help="Samples of each family.")] = 16,
    passes: Annotated[int, typer.Option(min=1, help="Rollout passes.")] = 2,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all.")] = 0,
    autocast: Annotated[
        list[str] | None, typer.Option(help="off or bfloat16; repeat. Default: both.")
    ] = None,
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = DEFAULT_OUTPUT,
) -> None:
    """Measure training at batch 8 against batch 1."""
    chosen = autocast or list(AUTOCAST)
    if threads:
        torch.set_num_threads(threads)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, processes("auto") as group:
        data = write_samples(Path(name), per_family)
        for mode, precision in product(("online", "offline"), chosen):
            config = recipe(model, data, mode, precision, passes)
            results[f"{mode}, autocast {precision}"] = report(measure(config, turns, group))
    show(results)
    settings = {
        "batch_sizes": [SMALL, LARGE],
        "passes": passes,
        "threads": torch.get_num_threads(),
        "autocast": chosen,
    }
    machine = describe_machine()
    write_report(output, {"settings": settings, "teacher": results, "machine": machine})


def show(results: dict[str, Any]) -> None:
    """Print a table."""
    table = Table("teacher", f"tokens/s, batch {SMALL}", f"tokens/s, batch {LARGE}", "speedup")
    for mode, found in results.items():
        speeds = [f"{value:.0f}" for value in found["tokens_per_second"].values()]
        low, high = found["speedup_interval_95"]
        table.add_row(mode, *speeds, f"{found['speedup']:.2f} ({low:.2f} to {high:.2f})")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
