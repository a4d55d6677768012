"""Samples per second of regeneration: `python -m benchmarks.regenerate_speed`.

The offline engine of `vispec regenerate` against Hugging Face's `generate`, one sample at a time,
in one process: same prompts, same number of new tokens (greedy, end-of-turn ignored), same dtype.
Image preparation counts on both sides, start-up on neither.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.options import ModelOption
from benchmarks.report import write_report
from examples.tiny_vlm.samples import DemoSample, demo_samples
from examples.tiny_vlm.shipped import TARGET
from vllm_vispec.bench.machine import describe_machine
from vllm_vispec.data.images import open_image
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.regenerate.dialogue import Regenerated
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.types import Conversation, Rejected
from vllm_vispec.utils.errors import ViSpecError

if TYPE_CHECKING:
    from vllm_vispec.data.regenerate.offline import OfflineBackend

DEFAULT_OUTPUT = Path("benchmarks/results/regenerate_speed.json")
GOAL = 5.0
WARM_UP = 2
ENGINE_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Timed:
    """Seconds for all samples, and the new tokens of each by its id."""

    seconds: float
    tokens: dict[str, list[int]]

    @property
    def samples_per_second(self) -> float:
        """The rate."""
        return len(self.tokens) / self.seconds


def write_questions(samples: Iterable[DemoSample], folder: Path) -> Path:
    """Write the first questions of samples with an image as an input file."""
    file = folder / "questions.jsonl"
    with file.open("w", encoding="utf-8") as sink:
        for number, sample in enumerate(samples):
            name = f"{number}.png"
            sample.images[0].save(folder / name)
            content = [
                {"type": "image", "image": name} if part["type"] == "image" else part
                for part in sample.messages[0]["content"]
            ]
            messages = [{"role": "user", "content": content}]
            print(json.dumps({"id": str(number), "messages": messages}), file=sink)
    return file


def interleaved(count: int) -> Iterator[DemoSample]:
    """Return held-out samples with an image, families in turns."""
    groups: dict[str, list[DemoSample]] = {}
    for sample in demo_samples(count):
        if sample.images:
            groups.setdefault(sample.family, []).append(sample)
    rounds = chain.from_iterable(zip(*groups.values(), strict=True))
    return (sample for sample, _ in zip(rounds, range(count), strict=False))


def run_engine(backend: OfflineBackend, conversations: Sequence[Conversation]) -> Timed:
    """Let the offline backend answer everything."""
    start = time.perf_counter()
    results = list(backend.answer(conversations))
    seconds = time.perf_counter() - start
    tokens = {}
    for result in results:
        if not isinstance(result, Regenerated):
            raise ViSpecError(f"sample {result.sample_id} was rejected: {result.reason}")
        tokens[result.conversation.sample_id] = list(result.answers[0].token_ids or ())
    return Timed(seconds, tokens)


def run_one_by_one(settings: RegenerateSettings, conversations: Sequence[Conversation]) -> Timed:
    """Let Hugging Face answer one conversation after the other."""
    import torch
    from transformers import AutoModelForImageTextToText

    from vllm_vispec.data.template import ChatTemplate, load_processor

    dtype = getattr(torch, settings.dtype)
    model = AutoModelForImageTextToText.from_pretrained(settings.target, dtype=dtype).eval()
    template = ChatTemplate(load_processor(settings.target))
    model.generation_config.eos_token_id = None  # what ignore_eos is for the engine

    def answer(conversation: Conversation) -> list[int]:
        images = [open_image(path, settings.images_from) for path in conversation.images]
        text = template.render(conversation.turns, open_answer=True)
        inputs = template.processor(text=[text], images=images, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=settings.max_tokens)
        return ids[0, inputs["input_ids"].shape[1] :].tolist()

    answer(conversations[0])
    start = time.perf_counter()
    tokens = {item.sample_id: answer(item) for item in conversations}
    return Timed(time.perf_counter() - start, tokens)


def shared_prefix(first: Timed, second: Timed) -> float:
    """Return the mean share of tokens before the two sides first differ."""
    shares = []
    for name, ids in first.tokens.items():
        pairs = zip(ids, second.tokens[name], strict=True)
        same = next((i for i, (one, other) in enumerate(pairs) if one != other), len(ids))
        shares.append(same / len(ids))
    return sum(shares) / len(shares)


def to_table(engine: Timed, single: Timed) -> Table:
    """Return both rates."""
    table = Table(title="Regeneration")
    for name in ("side", "seconds", "samples/s", "tokens/s"):
        table.add_column(name, justify="left" if name == "side" else "right")
    for name, timed in (("vispec regenerate", engine), ("generate, one by one", single)):
        tokens = sum(map(len, timed.tokens.values()))
        table.add_row(
            name,
            f"{timed.seconds:.1f}",
            f"{timed.samples_per_second:.2f}",
            f"{tokens / timed.seconds:.0f}",
        )
    return table


def to_content(engine: Timed, single: Timed) -> dict[str, Any]:
    """Return both sides and their ratio."""
    return {
        "seconds": {"engine": engine.seconds, "one_by_one": single.seconds},
        "samples_per_second": {
            "engine": engine.samples_per_second,
            "one_by_one": single.samples_per_second,
        },
        "speedup": engine.samples_per_second / single.samples_per_second,
        "goal": GOAL,
        "shared_prefix": shared_prefix(engine, single),
    }


def measure(settings: RegenerateSettings, count: int) -> tuple[Timed, Timed]:
    """Run both sides on the first samples of the input."""
    from vllm_vispec.data.regenerate.offline import OfflineBackend

    items = [item for item in read_conversations(settings.input) if not isinstance(item, Rejected)]
    backend = OfflineBackend(settings)
    try:
        run_engine(backend, items[count:])
        engine = run_engine(backend, items[:count])
    finally:
        backend.close()
    return engine, run_one_by_one(settings, items[:count])


def main(
    model: ModelOption = TARGET,
    samples: Annotated[int, typer.Option(min=1)] = 24,
    max_tokens: Annotated[int, typer.Option(min=1)] = 96,
    dtype: Annotated[str, typer.Option()] = "float32",
    max_model_len: Annotated[int, typer.Option()] = 1024,
    eager: Annotated[bool, typer.Option(help="No compilation in the engine.")] = False,
    output: Annotated[Path, typer.Option(help="JSON file.")] = DEFAULT_OUTPUT,
) -> None:
    """Compare regeneration through vLLM with one-by-one generation."""
    for name, value in ENGINE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="regenerate-speed-") as name:
        folder = Path(name)
        settings = RegenerateSettings(
            target=str(model),
            # Different samples warm up, so that no prefix or image is known already.
            input=write_questions(interleaved(samples + WARM_UP), folder),
            output=folder / "out.jsonl",
            prompt_style="none",
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            dtype=dtype,
            max_model_len=max_model_len,
            engine={"enforce_eager": eager},
        )
        engine, single = measure(settings, samples)
    Console(width=100).print(to_table(engine, single))
    content = to_content(engine, single)
    print(f"speedup: {content['speedup']:.2f} (at least {GOAL:.0f})")
    options: dict[str, Any] = {"samples": samples, "max_tokens": max_tokens, "dtype": dtype}
    options["eager"] = eager
    options["threads"] = os.environ.get("OMP_NUM_THREADS", "not set")
    write_report(output, {"machine": machine, "settings": options} | content)


if __name__ == "__main__":
    typer.run(main)
