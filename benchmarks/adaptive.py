"""ViSpec as it is served by default, beside plain vLLM: `python -m benchmarks adaptive`.

With the shipped head and with a head of random weights, at every load in one run. Servers are up
beside each other and take turns; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks.pair_report import FIRST_SAMPLE, THREADS, pair_settings
from benchmarks.report import RESULTS, write_report
from examples.tiny_vlm.questions import IMAGE_FAMILIES, write_questions
from vllm_vispec.bench.bootstrap import with_interval
from vllm_vispec.bench.datasets import DatasetOptions, load_dataset
from vllm_vispec.bench.metrics import baseline_key, by_key, measure
from vllm_vispec.bench.runner import Tools, run_matrix
from vllm_vispec.bench.schema import IMAGES_AS_THEY_ARE, BenchRun
from vllm_vispec.cli.options import exit_on_error

SAMPLES, MAX_TOKENS = 96, 32
FLOORS = {"vispec_adaptive": 0.98, "vispec_random": 0.95}
"""The decode_speedup that is wanted at every load."""
METRICS = ("e2e_speedup", "ttft_ratio", "acceptance_length", "identical_outputs")


def summarise(run: BenchRun) -> list[dict[str, Any]]:
    """Return a row for each variant, load and number of image tokens."""
    groups = by_key(run.cells)
    rows = []
    for key, cells in groups.items():
        if key.variant not in FLOORS:
            continue
        plain = groups.get(baseline_key(key), ())
        found = with_interval("decode_speedup", cells, plain)
        rows.append(
            {
                "variant": key.variant,
                "concurrency": key.concurrency,
                "images": key.image_tokens != 0,
                "decode_speedup": found.value,
                "interval_95": [found.low, found.high],
                **{name: measure(name, cells, plain) for name in METRICS},
                "is_met": bool(found.value and found.value >= FLOORS[key.variant]),
            }
        )
    return rows


def main(
    concurrency: Annotated[list[int] | None, typer.Option(help="Repeat; default 1 to 64.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Of every cell.")] = 3,
    k: Annotated[int, typer.Option(min=1, help="The most draft tokens.")] = 5,
    least: Annotated[int, typer.Option(min=1, help="Questions of a cell, at least.")] = 24,
    work: Annotated[Path, typer.Option(help="The run in progress.")] = Path("out/adaptive"),
    output: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "adaptive.json",
) -> None:
    """Measure the default against plain vLLM, with a good head and with one of no use."""
    os.environ.setdefault("OMP_NUM_THREADS", THREADS)
    settings = pair_settings(repetitions=repetitions, least=least).replace(
        variants=("plain", *FLOORS),
        concurrency=tuple(concurrency or (1, 2, 4, 8, 16, 32, 64)),
        num_speculative_tokens=(k,),
        temperatures=(0.0,),
        image_tokens=(IMAGES_AS_THEY_ARE, 0),
    )
    data = work / "data"
    with exit_on_error():
        if not (data / "questions.jsonl").exists():
            write_questions(data, "heldout", FIRST_SAMPLE, SAMPLES, IMAGE_FAMILIES)
        options = DatasetOptions(limit=SAMPLES, max_tokens=MAX_TOKENS)
        samples = load_dataset(settings.dataset, data, options).samples
        run_matrix(settings, samples, work / "run", tools=Tools(log=typer.echo))
        rows = summarise(BenchRun.load(work / "run"))
    print(pd.DataFrame(rows).round(2).to_string(index=False))
    content = {"settings": {"repetitions": repetitions, "k": k, "least": least}, "results": rows}
    write_report(output, content)
