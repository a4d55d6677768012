"""What a training step costs with one setting or another: `python -m benchmarks training-step`.

Runs of the tiny recipe stay ready beside each other and take a few steps in turns, so that all of
them meet the same state of the machine. A sample's time is that of its step, waiting included, over
the step's samples; each is divided by that of the first variant in the same round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks import ThreadsOption
from benchmarks.report import RESULTS, join_tables, write_report
from examples.tiny_vlm.families import FAMILIES
from examples.tiny_vlm.questions import write_questions
from vllm_vispec.train.config import load_config
from vllm_vispec.train.distributed import processes
from vllm_vispec.train.loop import Run
from vllm_vispec.train.preflight import prepare

RECIPE = "examples/recipes/tiny.yaml"
FIRST = 30_000_000
STEP_SAMPLES = 16
# Settings beside those of the recipe, which is offline with 16 samples in one forward pass.
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "offline": ("data.workers=0",),
    "offline, 2 workers": ("data.workers=2",),
    "offline, one sample a pass": ("data.workers=0", "batch.size=1", "batch.accumulate=16"),
    "offline, at most 2,048 tokens a pass": ("data.workers=0", "batch.max_tokens=2048"),
    "offline, compiled": ("data.workers=0", "run.compile=on"),
    "online": ("data.workers=0", "teacher.mode=online"),
    "online, 2 workers": ("data.workers=2", "teacher.mode=online"),
    "online, eager attention": (
        "data.workers=0",
        "teacher.mode=online",
        "target.attention=eager",
    ),
}


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a variant in a round.")] = 3,
    samples: Annotated[int, typer.Option(min=STEP_SAMPLES, help="Dialogues to train on.")] = 320,
    threads: ThreadsOption = 1,
    output: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "training_step.json",
    folder: Annotated[Path, typer.Option(help="For data, cache and runs.")] = Path(
        "out/training_step"
    ),
) -> None:
    """Measure variants of a training step in turns."""
    torch.set_num_threads(threads)
    # Not the target's answers: lengths and images count here.
    data = write_questions(folder / "data", "train", FIRST, samples, tuple(FAMILIES), whole=True)
    common = [f"data.train={data}", "data.validation=", "data.memory_mb=0", "run.log_every=1",
              f"teacher.cache_dir={folder / 'cache'}", "run.autocast=off"]  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with processes("cpu") as group:
        runs: dict[str, Run] = {}
        for number, (name, changes) in enumerate(VARIANTS.items()):
            place = folder / f"run{number}"
            (place / "metrics.jsonl").unlink(missing_ok=True)
            config = load_config(RECIPE, [*common, *changes, f"run.output={place}"])
            runs[name] = Run(*prepare(config, 1), group, (), "benchmark")
            runs[name].time(0, 1)
        for number in range(rounds):
            for name, run in runs.items():
                seconds[name].append(run.time(1, steps) / STEP_SAMPLES)
            waited = {name: _waited(run.output) for name, run in runs.items()}
            found = summarise(seconds, waited)
            # After each round, for those who have waited long enough.
            write_report(output, {"rounds": number + 1, "steps": steps, "variants": found})
    print(to_markdown({"rounds": rounds, "variants": found}))


def summarise(
    seconds: Mapping[str, list[float]], waited: Mapping[str, list[float]]
) -> dict[str, dict[str, Any]]:
    """What the JSON says of each variant.

    Args:
        seconds: of a sample, by round.
        waited: share of each step that its samples were waited for.
    """
    first = seconds[next(iter(VARIANTS))]
    return {
        name: {
            "settings": list(VARIANTS[name]),
            "ms_per_sample": median(times) * 1e3,
            "ratios": [one / base for one, base in zip(times, first, strict=True)],
            "waited": median(waited[name]),
        }
        for name, times in seconds.items()
    }


def to_markdown(content: Mapping[str, Any]) -> str:
    """The table of the page."""
    rows = [
        [name, f"{min(one['ratios']):.2f} to {max(one['ratios']):.2f}", f"{one['waited']:.1%}"]
        for name, one in content["variants"].items()
    ]
    head = ["variant", f"time of a sample, over {content['rounds']} rounds", "waiting in it"]
    return join_tables([("", [head, *rows])])


def _waited(folder: Path) -> list[float]:
    """Share of each step that its samples were waited for."""
    lines: list[dict[str, Any]] = [json.loads(x) for x in (folder / "metrics.jsonl").open()]
    return [line["waited_for_samples"] for line in lines if line["kind"] == "train"]


if __name__ == "__main__":
    typer.run(main)
