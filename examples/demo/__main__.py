"""Answer held-out images with plain vLLM and with ViSpec, and show what came out.

Exits with 1 if any answer differs between the two.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.demo.compare import Exchange, run_exchanges, summarise, warm_up
from examples.demo.job import Job
from examples.demo.page import render_page
from examples.demo.side import Side
from examples.demo.table import print_lines, print_tables
from examples.pair import DraftOption, DraftTokensOption, ModelOption, Pair
from examples.tiny_vlm.samples import demo_samples
from examples.tiny_vlm.shipped import DRAFT_TOKENS, HEAD, TARGET
from vllm_vispec.utils.errors import ViSpecError

WARM_UP_SAMPLES = 2


def run(
    job: Job, repetitions: int, threads: int, log_folder: Path, console: Console
) -> list[Exchange]:
    """Start both engines one after the other and let them answer in turns."""
    samples = range(len(list(demo_samples(job.per_family, job.families or None))))
    plain_job = replace(job, draft_model=None)
    console.print(f"starting plain vLLM (log: {log_folder / 'plain.log'}) ...")
    with Side("plain", plain_job, log_folder / "plain.log", threads) as plain:
        console.print(f"starting vLLM with ViSpec (log: {log_folder / 'vispec.log'}) ...")
        with (
            Side("ViSpec", job, log_folder / "vispec.log", threads) as vispec,
            _progress(console) as progress,
        ):
            for side in (plain, vispec):
                warm_up(side, samples[:WARM_UP_SAMPLES])
            task = progress.add_task("answering", total=2 * repetitions * len(samples))
            return run_exchanges(
                plain, vispec, samples, repetitions, lambda: progress.advance(task)
            )


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console)


def main(
    model: ModelOption = TARGET,
    draft_model: DraftOption = HEAD,
    num_speculative_tokens: DraftTokensOption = DRAFT_TOKENS,
    per_family: Annotated[int, typer.Option(min=1, help="Images per task family.")] = 2,
    repetitions: Annotated[int, typer.Option(min=1, help="Times every image is answered.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest answer.")] = 256,
    dtype: Annotated[str, typer.Option(help="float32 makes equal outputs exact.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each engine.")] = 1,
    family: Annotated[list[str] | None, typer.Option(help="Only these task families.")] = None,
    output: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("out/demo.html"),
) -> None:
    """Compare plain vLLM with ViSpec on held-out images of the tiny VLM."""
    pair = Pair(model, draft_model, num_speculative_tokens)
    job = Job.of_pair(
        pair,
        dtype=dtype,
        max_tokens=max_tokens,
        per_family=per_family,
        families=family or (),
    )
    console = Console()
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        exchanges = run(job, repetitions, threads, output.parent, console)
    except ViSpecError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    samples = list(demo_samples(per_family, job.families or None))
    summary = summarise(exchanges, num_speculative_tokens)
    families = {index: sample.family for index, sample in enumerate(samples)}
    print_tables(console, summary, exchanges, families, num_speculative_tokens)
    settings = (
        f"{num_speculative_tokens} draft tokens per step, {dtype}, greedy, batch 1, "
        f"{repetitions} repetitions in turns, {threads} CPU thread(s)"
    )
    output.write_text(render_page(summary, samples, exchanges, settings), encoding="utf-8")
    console.print(f"page: {output}")
    print_lines(summary)
    if summary.identical != summary.total:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
