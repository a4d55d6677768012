"""The committed reports on the shipped pair, from nothing: data, measurement, pages, JSON.

`make report`, or `python -m benchmarks.pair_report`. Stopped in between, it goes on from there.
"""

from __future__ import annotations

import gzip
import os
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report import RESULTS
from examples.tiny_vlm.questions import IMAGE_FAMILIES, write_questions
from vllm_vispec.bench.datasets import DatasetOptions, load_dataset
from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.report import write_report
from vllm_vispec.bench.runner import Tools, run_matrix
from vllm_vispec.bench.schedules import Ranges, as_schedule
from vllm_vispec.bench.schema import CELLS_FILE, IMAGES_AS_THEY_ARE, PACKED_FILE, RUN_FILE
from vllm_vispec.cli.options import exit_on_error

PAIR = "examples/tiny_vlm/checkpoints"
# Relative, so that the commands in the report can be typed in any copy of the repository.
WORK, PAGES = Path("out/pair_report"), Path("docs/report")
TUNED = RESULTS / "tune.json"
"""What `vispec bench tune` found for the pair; its setting is one variant of the report."""
FIRST_SAMPLE = 700_000
"""Of the held-out split; not used for anything else."""
SAMPLES, MAX_TOKENS, LEAST, REPETITIONS = 96, 32, 4, 3
HEADS = ("plain", "ngram", "eagle", "vispec_zeroed", "vispec", "vispec_adaptive")
SIBLINGS = ("plain", "vispec", "sibling", "sibling_prune", "sibling_none")
"""A report's servers run side by side, 2.6 GiB each. All in one report do not fit 24 GiB."""
THREADS = "1"
"""Of each server: the other core is for the load generator."""
SERVE_ARGS = (
    *("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"),
    *("--mm-processor-kwargs", '{"min_pixels": 784, "max_pixels": 802816}'),
)


def pair_settings(
    schedule: Ranges = (),
    repetitions: int = REPETITIONS,
    least: int = LEAST,
    variants: tuple[str, ...] = HEADS,
) -> MatrixSettings:
    """Return the matrix of a committed report.

    Args:
        schedule: K by batch size of the variant "vispec_tuned"; empty leaves that variant out.
        repetitions: of every cell.
        least: questions of a cell, at least.
        variants: what is compared.
    """
    tuned = ("vispec_tuned",) if schedule else ()
    return MatrixSettings(
        target=f"{PAIR}/target",
        dataset="tiny",
        head=f"{PAIR}/vispec_head",
        eagle_head=f"{PAIR}/eagle_text_head",
        sibling=f"{PAIR}/sibling",
        variants=(*variants, *tuned),
        schedule=schedule,
        design="star",
        concurrency=(1, 2, 4, 8, 16, 32, 64),
        num_speculative_tokens=(5, 3, 7),
        temperatures=(0.0, 1.0),
        image_tokens=(IMAGES_AS_THEY_ARE, 0, 64, 256, 1024),
        repetitions=repetitions,
        waves=2,
        least=least,
        serve_args=SERVE_ARGS,
    )


def reproduce(
    settings: MatrixSettings,
    work: Path,
    pages: Path,
    results: Path,
    tools: Tools,
    samples: int = SAMPLES,
    max_tokens: int = MAX_TOKENS,
) -> bool:
    """Make data, measure, and write pages and JSON; returns whether every cell was measured.

    Args:
        work: folder of the data and the run.
        pages: folder of the report.
        results: folder of the run's JSON, packed.
        samples: how many to write and to choose from.
        max_tokens: longest answer.

    Raises:
        ViSpecError: see `run_matrix` and `write_report`.
        KeyboardInterrupt: on SIGINT and SIGTERM; the next call goes on.
    """
    data, run = work / "data", work / "run"
    if not (data / "questions.jsonl").exists():
        write_questions(data, "heldout", FIRST_SAMPLE, samples, IMAGE_FAMILIES)
    options = DatasetOptions(limit=samples, max_tokens=max_tokens)
    loaded = load_dataset(settings.dataset, data, options)
    outcome = run_matrix(settings, loaded.samples, run, tools=tools)
    results.mkdir(parents=True, exist_ok=True)
    packed = gzip.compress((run / CELLS_FILE).read_bytes(), mtime=0)
    (results / PACKED_FILE).write_bytes(packed)
    # Of an earlier version, or of a run that was continued there.
    (results / CELLS_FILE).unlink(missing_ok=True)
    shutil.copyfile(run / RUN_FILE, results / RUN_FILE)
    files = write_report(results, pages)
    tools.log(f"{files.markdown}, {files.html}; the run: {results}")
    return outcome.failed == 0


def main(
    work: Annotated[Path, typer.Option(help="Data and the run in progress.")] = WORK,
    pages: Annotated[Path, typer.Option(help="Folder of the report.")] = PAGES,
    results: Annotated[Path, typer.Option(help="Folder of the JSON.")] = RESULTS / "pair_report",
    schedule: Annotated[
        str, typer.Option(help="K by batch size of the tuned variant; an empty text: none.")
    ] = str(TUNED),
    repetitions: Annotated[int, typer.Option(help="Of every cell.")] = REPETITIONS,
    least: Annotated[int, typer.Option(help="Questions of a cell, at least.")] = LEAST,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = MAX_TOKENS,
) -> None:
    """Reproduce the reports on the shipped pair: heads, and published drafts (`siblings`)."""
    begin = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", THREADS)
    with exit_on_error():
        heads = pair_settings(as_schedule(schedule), repetitions, least)
        siblings = pair_settings((), repetitions, least, SIBLINGS)
        tools = Tools(log=typer.echo)
        complete = True
        for settings, name in ((heads, ""), (siblings, "siblings")):
            folders = work / name, pages / name, results / name
            complete &= reproduce(settings, *folders, tools, max_tokens=max_tokens)
            typer.echo(f"{(time.monotonic() - begin) / 60:.1f} minutes")
        raise typer.Exit(0 if complete else 1)


if __name__ == "__main__":
    typer.run(main)
