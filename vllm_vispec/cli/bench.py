"""`vispec bench`: measure, report, estimate. Everything heavy is imported on use."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_vispec.bench.datasets.types import DatasetOptions
from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.cli.bench_estimate import calibrate, estimate
from vllm_vispec.cli.bench_profile import profile
from vllm_vispec.cli.bench_tune import tune
from vllm_vispec.cli.errors import exit_on_error
from vllm_vispec.cli.options import INTERRUPTED
from vllm_vispec.cli.settings import options_of

if TYPE_CHECKING:
    from vllm_vispec.bench.datasets import LoadedDataset

TINY_PAIR = "examples/tiny_vlm/checkpoints"

app = typer.Typer(
    help="Benchmarks: plain vLLM and every way to speculate, side by side.",
    no_args_is_help=True,
)

Target = Annotated[str, typer.Option(help="Target: a folder or hub id.")]
Dataset = Annotated[str, typer.Option(help="How to read --data: mmspec, vispec, openai or tiny.")]
Data = Annotated[Path, typer.Option(help="The dataset's file or folder.")]
Serve = Annotated[str, typer.Option(help="Options of vllm serve for all sides, one string.")]
Limit = Annotated[int | None, typer.Option(help="Most samples; default: all.")]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer; default: the dataset's.")]


@app.command()
@options_of(MatrixSettings, DatasetOptions)
def run(
    settings: MatrixSettings,
    options: DatasetOptions,
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder; an earlier run in it is continued.")],
    port: Annotated[int, typer.Option(help="First port of the servers; 0: any.")] = 0,
) -> int:
    """Measure a matrix of sides and settings, cell by cell, sides taking turns.

    The sides are servers on this machine, up at the same time; `vllm bench serve` makes the load.
    """
    from vllm_vispec.bench.datasets.load import load_dataset

    return measure_matrix(settings, load_dataset(settings.dataset, data, options), output, port)


@app.command()
def quick(
    data: Data,
    target: Target = f"{TINY_PAIR}/target",
    head: Annotated[str, typer.Option(help="ViSpec head.")] = f"{TINY_PAIR}/vispec_head",
    dataset: Dataset = "tiny",
    output: Annotated[Path | None, typer.Option(help="Folder; default: a temporary one.")] = None,
    num_speculative_tokens: Annotated[
        int, typer.Option("--num-speculative-tokens", "-k", help="K.")
    ] = 4,
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    serve: Serve = "",
) -> None:
    """Check in minutes that outputs are plain vLLM's and acceptance is what it was.

    Fails if a floor is missed. Time is measured, but nothing depends on it.
    """

    def check() -> int:
        from vllm_vispec.bench import quick as small
        from vllm_vispec.bench.datasets.load import load_dataset
        from vllm_vispec.bench.schema import BenchRun

        serve_args = shlex.split(serve) or small.SERVE_ARGS
        settings = small.quick_settings(target, head, dataset, num_speculative_tokens, serve_args)
        options = DatasetOptions(
            limit=limit or small.SAMPLES, max_tokens=max_tokens or small.MAX_TOKENS
        )
        with tempfile.TemporaryDirectory(prefix="vispec-bench-") as scratch:
            folder = output or Path(scratch)
            measure_matrix(settings, load_dataset(dataset, data, options), folder, 0)
            findings = small.judge(BenchRun.load(folder), settings, small.Floors())
        for finding in findings:
            typer.echo(str(finding))
        return 0 if all(finding.ok for finding in findings) else 1

    with exit_on_error():
        raise typer.Exit(check())


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="Folder of a run, or its JSON file.")],
    output: Annotated[Path, typer.Option(help="Folder to write the pages to.")],
) -> None:
    """Turn a run into a page, HTML and Markdown."""
    with exit_on_error():
        from vllm_vispec.bench.report import write_report

        files = write_report(results, output)
    typer.echo(f"wrote {files.html} and {files.markdown}")


app.command()(estimate)
app.command()(calibrate)
app.command()(profile)
app.command()(tune)


def measure_matrix(settings: MatrixSettings, loaded: LoadedDataset, output: Path, port: int) -> int:
    """Measure, say what happened, return the exit code."""
    from vllm_vispec.bench.runner import Tools, run_matrix

    for line in loaded.notes():
        typer.echo(line)
    busiest = max(settings.concurrency)
    if busiest > len(loaded.samples):
        typer.echo(
            f"warning: {len(loaded.samples)} samples cannot keep {busiest} requests in flight",
            err=True,
        )
    try:
        outcome = run_matrix(settings, loaded.samples, output, port, Tools(say=typer.echo))
    except KeyboardInterrupt:
        typer.echo("stopped: the same command goes on from here", err=True)
        return INTERRUPTED
    typer.echo(
        f"{outcome.measured} cells measured, {outcome.failed} failed, {outcome.found} were there; "
        f"see {output}"
    )
    return 1 if outcome.failed else 0
