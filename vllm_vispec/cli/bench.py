"""`vispec bench`: measure, report, estimate. Everything heavy is imported on use."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_vispec.cli.bench_estimate import calibrate, estimate
from vllm_vispec.cli.bench_profile import profile
from vllm_vispec.cli.bench_tune import tune
from vllm_vispec.cli.errors import exit_on_error
from vllm_vispec.cli.options import AS_THEY_ARE, INTERRUPTED, number_of_image_tokens, split

if TYPE_CHECKING:
    from vllm_vispec.bench.datasets import LoadedDataset
    from vllm_vispec.bench.matrix import MatrixSettings

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
def run(
    target: Target,
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder; an earlier run in it is continued.")],
    dataset: Dataset = "openai",
    head: Annotated[str | None, typer.Option(help="ViSpec head: a folder or hub id.")] = None,
    eagle_head: Annotated[
        str | None, typer.Option(help="Text-trained head for the side eagle.")
    ] = None,
    sides: Annotated[
        str, typer.Option(help="Of plain, ngram, eagle, vispec_zeroed, vispec, vispec_tuned.")
    ] = "plain,vispec",
    concurrency: Annotated[str, typer.Option(help="Requests in flight, e.g. 1,4,16.")] = "1",
    num_speculative_tokens: Annotated[
        str, typer.Option("--num-speculative-tokens", "-k", help="K, e.g. 3,5.")
    ] = "4",
    schedule: Annotated[
        str | None, typer.Option(help="K by batch size for vispec_tuned: JSON or a file.")
    ] = None,
    temperatures: Annotated[str, typer.Option(help="0 is greedy; e.g. 0,1.")] = "0",
    image_tokens: Annotated[
        str, typer.Option(help="Image tokens of a request, e.g. native,0,256.")
    ] = AS_THEY_ARE,
    design: Annotated[
        str, typer.Option(help="full: every combination; star: each axis by itself.")
    ] = "full",
    repetitions: Annotated[int, typer.Option(help="Of every cell.")] = 3,
    waves: Annotated[int, typer.Option(help="Questions of a cell per request in flight.")] = 2,
    least: Annotated[int, typer.Option(help="Questions of a cell, at least.")] = 24,
    warm_up: Annotated[int, typer.Option(help="Requests before a server's first cell.")] = 2,
    families: Annotated[str, typer.Option(help="Only these, separated by commas.")] = "",
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    seed: Annotated[int, typer.Option(help="Which samples --limit keeps.")] = 0,
    image_root: Annotated[Path | None, typer.Option(help="Where image paths start.")] = None,
    serve: Serve = "",
    port: Annotated[int, typer.Option(help="First port of the servers; 0: any.")] = 0,
    cell_timeout: Annotated[float, typer.Option(help="Longest cell, in seconds.")] = 7200.0,
) -> None:
    """Measure a matrix of sides and settings, cell by cell, sides taking turns.

    The sides are servers on this machine, up at the same time; `vllm bench serve` makes the load.
    """

    def measure() -> int:
        from vllm_vispec.bench.datasets import DatasetOptions, load_dataset
        from vllm_vispec.bench.matrix import MatrixSettings
        from vllm_vispec.bench.schedules import read_schedule

        settings = MatrixSettings(
            target=target,
            dataset=dataset,
            head=head,
            eagle_head=eagle_head,
            sides=split("--sides", sides, str),
            concurrency=split("--concurrency", concurrency, int),
            num_speculative_tokens=split("-k", num_speculative_tokens, int),
            schedule=read_schedule(schedule) if schedule else (),
            temperatures=split("--temperatures", temperatures, float),
            image_tokens=split("--image-tokens", image_tokens, number_of_image_tokens),
            design=design,
            repetitions=repetitions,
            waves=waves,
            least=least,
            warm_up=warm_up,
            serve_args=tuple(shlex.split(serve)),
            cell_timeout_s=cell_timeout,
        )
        wanted = split("--families", families, str) if families else ()
        options = DatasetOptions(wanted, limit, seed, max_tokens, image_root)
        return measure_matrix(settings, load_dataset(dataset, data, options), output, port)

    with exit_on_error():
        raise typer.Exit(measure())


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
        from vllm_vispec.bench.datasets import DatasetOptions, load_dataset
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
    from vllm_vispec.bench.report import write_report

    with exit_on_error():
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
