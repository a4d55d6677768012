"""Cost of a ViSpec draft beside vLLM's own EAGLE: `python -m benchmarks.draft_cost`.

Two engines with the same target take turns, one with the ViSpec head, one with an EAGLE head of
the same sizes that vLLM's own proposer drives. Medians over all decoding rounds (V1 runner).

* first pass: from the call of the proposer to the logits of the first draft token.
* step: from the logits of one draft token to those of the next, mean of a round.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.eagle_head import write_eagle_head
from benchmarks.probe_worker import CLOCK_VARIABLE
from benchmarks.report import bootstrap_interval, describe_machine, write_report
from benchmarks.round_probe import PARTS, WHOLE
from examples.demo.job import Job
from examples.demo.side import Side
from examples.pair import (
    DEFAULT_DRAFT_MODEL,
    DEFAULT_DRAFT_TOKENS,
    DEFAULT_MODEL,
    DraftOption,
    DraftTokensOption,
    ModelOption,
    Pair,
)
from examples.tiny_vlm.samples import demo_samples

DEFAULT_OUTPUT = Path("benchmarks/results/draft_cost.json")
MOST_ALLOWED = 1.10
WORKER = "benchmarks.probe_worker"
Rounds = list[dict[str, float]]


@dataclass(frozen=True)
class Block:
    """The rounds of one request on both sides."""

    vispec: Rounds
    eagle: Rounds


def measure(vispec: Side, eagle: Side, samples: Sequence[int], repetitions: int) -> list[Block]:
    """Let both sides answer in turns; the first request of each only warms up."""
    blocks = []
    for side in (vispec, eagle):
        side.request({"sample": samples[0]})
    for repetition in range(repetitions):
        for sample in samples:
            sides = (vispec, eagle) if (repetition + sample) % 2 == 0 else (eagle, vispec)
            found = {side.name: side.request({"sample": sample})["rounds"] for side in sides}
            if found[vispec.name] and found[eagle.name]:
                blocks.append(Block(found[vispec.name], found[eagle.name]))
    return blocks


def cost(blocks: Sequence[Block], side: str, part: str) -> float:
    """Return the median seconds of a part over all rounds of a side."""
    return median(times[part] for block in blocks for times in getattr(block, side))


def quiet_cost(blocks: Sequence[Block], side: str, part: str) -> float:
    """Return the first decile instead: the cost while nothing else disturbs the machine."""
    times = sorted(times[part] for block in blocks for times in getattr(block, side))
    return times[len(times) // 10]


def ratio(part: str) -> Callable[[Sequence[Block]], float]:
    """Return the function that computes ViSpec's cost over EAGLE's."""
    return lambda blocks: cost(blocks, "vispec", part) / cost(blocks, "eagle", part)


def profile(blocks: Sequence[Block]) -> dict[str, dict[str, Any]]:
    """Return, for each part of a round, both medians in seconds and their ratio."""
    parts = [part for part in (*PARTS, *WHOLE) if part in blocks[0].vispec[0]]
    return {
        part: {
            "vispec": cost(blocks, "vispec", part),
            "eagle": cost(blocks, "eagle", part),
            "ratio": ratio(part)(blocks),
            "ratio_first_decile": quiet_cost(blocks, "vispec", part)
            / quiet_cost(blocks, "eagle", part),
            "ratio_interval_95": bootstrap_interval(_medians(blocks, part), _paired_ratio),
        }
        for part in parts
    }


def _medians(blocks: Sequence[Block], part: str) -> list[tuple[float, float]]:
    """Reduce each block to a pair of medians, which makes resampling cheap."""
    return [(cost([block], "vispec", part), cost([block], "eagle", part)) for block in blocks]


def _paired_ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return median(vispec / eagle for vispec, eagle in pairs)


def to_table(parts: dict[str, dict[str, Any]]) -> Table:
    """Return the profile of a round."""
    table = Table(title="A decoding round, medians in ms")
    for name in ("part", "ViSpec", "EAGLE", "ratio", "95 %", "ratio of first deciles"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, part in parts.items():
        table.add_row(
            name,
            f"{1000 * part['vispec']:.3f}",
            f"{1000 * part['eagle']:.3f}",
            f"{part['ratio']:.3f}",
            "-".join(f"{end:.3f}" for end in part["ratio_interval_95"]),
            f"{part['ratio_first_decile']:.3f}",
        )
    return table


def run(job: Job, eagle_head: Path, repetitions: int, threads: int, logs: Path) -> list[Block]:
    """Start both engines and measure."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    samples = range(len(list(demo_samples(job.per_family, job.families or None))))
    eagle_job = replace(job, draft_model=str(eagle_head), method="eagle")
    with (
        Side("ViSpec", job, logs / "cost-vispec.log", threads, WORKER) as vispec,
        Side("EAGLE", eagle_job, logs / "cost-eagle.log", threads, WORKER) as eagle,
    ):
        return measure(vispec, eagle, samples, repetitions)


def main(
    model: ModelOption = DEFAULT_MODEL,
    draft_model: DraftOption = DEFAULT_DRAFT_MODEL,
    num_speculative_tokens: DraftTokensOption = DEFAULT_DRAFT_TOKENS,
    repetitions: Annotated[int, typer.Option(min=1)] = 3,
    per_family: Annotated[int, typer.Option(min=1, help="Images per task family.")] = 1,
    family: Annotated[list[str] | None, typer.Option(help="Only these task families.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2)] = 128,
    dtype: Annotated[str, typer.Option()] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each engine.")] = 1,
    clock: Annotated[str, typer.Option(help="wall, or cpu on a busy machine.")] = "wall",
    output: Annotated[Path, typer.Option(help="JSON file.")] = DEFAULT_OUTPUT,
    logs: Annotated[Path, typer.Option(help="Folder of the engines' logs.")] = Path("out"),
) -> None:
    """Compare the cost of a draft pass and of a draft step."""
    pair = Pair(model, draft_model, num_speculative_tokens)
    job = Job.of_pair(
        pair,
        dtype=dtype,
        max_tokens=max_tokens,
        per_family=per_family,
        families=family or (),
    )
    os.environ[CLOCK_VARIABLE] = clock
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="eagle-head-") as folder:
        eagle_head = write_eagle_head(Path(pair.draft_model), Path(folder))
        blocks = run(job, eagle_head, repetitions, threads, logs)
    parts = profile(blocks)
    Console(width=110).print(to_table(parts))
    for part in ("first_pass", "step"):
        if part in parts:
            quiet = parts[part]["ratio_first_decile"]
            print(
                f"{part} ratio: {parts[part]['ratio']:.3f}, of first deciles {quiet:.3f} "
                f"(at most {MOST_ALLOWED:.2f})"
            )
    counts = {
        side: sum(len(getattr(block, side)) for block in blocks) for side in ("vispec", "eagle")
    }
    settings = {"num_speculative_tokens": num_speculative_tokens, "dtype": dtype}
    settings |= {
        "clock": clock,
        "threads": threads,
        "repetitions": repetitions,
        "per_family": per_family,
    }
    content = {"machine": machine, "settings": settings, "rounds": counts, "seconds": parts}
    write_report(output, content)


if __name__ == "__main__":
    typer.run(main)
