"""`vispec bench`: measure, report, tune, profile, estimate. Everything heavy is imported on use."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from vllm_vispec.bench.calibrate import CalibrateOptions
from vllm_vispec.bench.datasets import DatasetOptions
from vllm_vispec.bench.estimate import EstimateOptions
from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.profile import ProfileSettings
from vllm_vispec.cli.options import INTERRUPTED, exit_on_error, options_of
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import write_json

if TYPE_CHECKING:
    from vllm_vispec.bench.datasets import LoadedDataset
    from vllm_vispec.bench.tune import Tuning

T = TypeVar("T")
TINY_PAIR = "examples/tiny_vlm/checkpoints"
MEASURED = "measured"

app = typer.Typer(
    help="Benchmarks: plain vLLM and every way to speculate, side by side.",
    no_args_is_help=True,
)


@app.command()
@options_of(MatrixSettings, DatasetOptions)
def run(
    settings: MatrixSettings,
    options: DatasetOptions,
    data: Annotated[Path, typer.Option(help="The dataset's file or folder.")],
    output: Annotated[Path, typer.Option(help="Folder; an earlier run in it is continued.")],
    port: Annotated[int, typer.Option(help="First port of the servers; 0: any.")] = 0,
) -> int:
    """Measure a matrix of sides and settings, cell by cell, sides taking turns.

    The sides are servers on this machine, up at the same time; `vllm bench serve` makes the load.
    """
    from vllm_vispec.bench.datasets import load_dataset

    return measure_matrix(settings, load_dataset(settings.dataset, data, options), output, port)


@dataclass(frozen=True)
class QuickSettings:
    """A small benchmark. First sentences are the options' help.

    Attributes:
        data: The dataset's file or folder.
        target: Target: a folder or hub id.
        head: ViSpec head.
        dataset: How to read --data: mmspec, vispec, openai or tiny.
        output: Folder; default: a temporary one.
        num_speculative_tokens: K.
        limit: Most samples; default: 12.
        max_tokens: Longest answer; default: 64.
        serve_args: Options of vllm serve for all sides, one string.
    """

    data: Path
    target: str = f"{TINY_PAIR}/target"
    head: str = f"{TINY_PAIR}/vispec_head"
    dataset: str = "tiny"
    output: Path | None = None
    num_speculative_tokens: int = 4
    limit: int | None = None
    max_tokens: int | None = None
    serve_args: tuple[str, ...] = ()


@app.command()
@options_of(QuickSettings)
def quick(given: QuickSettings) -> int:
    """Check in minutes that outputs are plain vLLM's and acceptance is what it was.

    Fails if a floor is missed. Time is measured, but nothing depends on it.
    """
    from vllm_vispec.bench import quick as small
    from vllm_vispec.bench.datasets import load_dataset
    from vllm_vispec.bench.schema import BenchRun

    settings = small.quick_settings(
        given.target,
        given.head,
        given.dataset,
        given.num_speculative_tokens,
        given.serve_args,
    )
    options = DatasetOptions(
        limit=given.limit or small.SAMPLES, max_tokens=given.max_tokens or small.MAX_TOKENS
    )
    with tempfile.TemporaryDirectory(prefix="vispec-bench-") as scratch:
        folder = given.output or Path(scratch)
        measure_matrix(settings, load_dataset(given.dataset, given.data, options), folder, 0)
        findings = list(small.judge(BenchRun.load(folder), settings))
    for _, line in findings:
        typer.echo(line)
    return 0 if all(ok for ok, _ in findings) else 1


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


@app.command()
@options_of(EstimateOptions)
def estimate(
    options: EstimateOptions,
    output: Annotated[Path | None, typer.Option(help="Write the estimates as JSON.")] = None,
) -> None:
    """Estimate decode_speedup from sizes, bandwidth, K and acceptance. Measures nothing."""
    from vllm_vispec.bench import estimate as model

    found = model.estimate(options)
    _show(model.estimate_to_markdown(found), found, output)


@app.command()
@options_of(CalibrateOptions)
def calibrate(
    options: CalibrateOptions,
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of `vispec bench run`, or the JSON of `python -m benchmarks decode-speed`."
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="Write rates and cells as JSON.")] = None,
) -> None:
    """Fit the cost model to some cells of a run and predict the others. Measures nothing."""
    from vllm_vispec.bench import calibrate as fit

    found = fit.calibrate_run(run, options)
    _show(fit.calibration_to_markdown(found), found, output)


@app.command()
@options_of(ProfileSettings)
def profile(
    settings: ProfileSettings,
    output: Annotated[Path, typer.Option(help="Folder for JSON, page and picture.")],
) -> int:
    """Split steps into target pass, draft passes, lm_head, sampling and host work.

    vLLM's own EAGLE and ViSpec take turns. Decoding and prefill steps are shown apart.
    """
    from vllm_vispec.bench.datasets import load_dataset
    from vllm_vispec.bench.profile import run_profile
    from vllm_vispec.bench.profile_result import to_page

    options = DatasetOptions(
        families=settings.families, limit=settings.limit, max_tokens=settings.max_tokens
    )
    loaded = load_dataset(settings.dataset, Path(settings.data), options)
    for line in loaded.notes():
        typer.echo(line)
    try:
        found = run_profile(settings, loaded.samples, output, typer.echo)
    except KeyboardInterrupt:
        typer.echo("stopped: nothing was written", err=True)
        return INTERRUPTED
    typer.echo(to_page(found))
    typer.echo(f"wrote profile.json, profile.md, profile.svg and profile.png to {output}")
    return 0


@dataclass(frozen=True)
class TuneSettings:
    """What is tuned. First sentences are the options' help.

    Attributes:
        target: Target: a folder or hub id.
        data: The dataset's file or folder.
        output: Folder; an earlier tuning in it is continued.
        head: ViSpec head: a folder or hub id.
        dataset: How to read --data: mmspec, vispec, openai or tiny.
        concurrency: Requests in flight; the loads that are tuned.
        num_speculative_tokens: K to choose from.
        temperatures: 0 is greedy; several are averaged.
        repetitions: Of every cell.
        waves: Questions of a cell per request in flight.
        least: Questions of a cell, at least.
        limit: Most samples; default: all.
        max_tokens: Longest answer; default: the dataset's.
        serve_args: Options of vllm serve, one string.
        port: First port of the servers; 0: any.
        by: What counts: decode_speedup or e2e_speedup.
        verify: Serve with the setting and measure it against plain vLLM.
    """

    target: str | None = None
    data: Path | None = None
    output: Path | None = None
    head: str | None = None
    dataset: str = "openai"
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    num_speculative_tokens: tuple[int, ...] = (0, 1, 2, 3, 5)
    temperatures: tuple[float, ...] = (0.0,)
    repetitions: int = 3
    waves: int = 2
    least: int = 24
    limit: int | None = None
    max_tokens: int | None = None
    serve_args: tuple[str, ...] = ()
    port: int = 0
    by: str = "decode_speedup"
    verify: bool = True

    def part(self, settings: type[T]) -> T:
        """Return other settings with the values of the same names."""
        names = {field.name for field in fields(settings)} & vars(self).keys()  # type: ignore[arg-type]
        return settings(**{name: getattr(self, name) for name in names})


@app.command()
@options_of(TuneSettings)
def tune(
    settings: TuneSettings,
    run: Annotated[
        Path | None,
        typer.Option("--from", help="Choose from a run of `vispec bench run`, measure nothing."),
    ] = None,
) -> int:
    """Find the K for every load on this machine and print the --speculative-config to use.

    Time never fails this: where the setting still loses, it says so.
    """
    from vllm_vispec.bench.schema import BenchRun
    from vllm_vispec.bench.tune import Tuning

    if run is None:
        return _measure_and_tune(settings)
    tuning = Tuning.from_run(BenchRun.load(run), settings.by)
    _show_tuning(tuning, settings.output or (run if run.is_dir() else run.parent))
    return 0


def _measure_and_tune(given: TuneSettings) -> int:
    """Measure, choose, try the choice; return the exit code."""
    from vllm_vispec.bench.datasets import load_dataset
    from vllm_vispec.bench.schema import BenchRun
    from vllm_vispec.bench.tune import Tuning

    for name in ("target", "head", "data", "output"):
        if getattr(given, name) is None:
            raise ViSpecError(f"--{name} is missing: give it, or --from with the folder of a run")
    given = replace(given, concurrency=tuple(sorted(given.concurrency)))
    settings, output, port = given.part(MatrixSettings), Path(given.output or ""), given.port
    loaded = load_dataset(given.dataset, Path(given.data or ""), given.part(DatasetOptions))
    code = measure_matrix(settings, loaded, output / MEASURED, port)
    if code == INTERRUPTED:
        return code
    # Cells of an earlier, wider call are used too.
    tuning = Tuning.from_run(BenchRun.load(output / MEASURED), given.by)
    if given.verify and tuning.config is not None:
        typer.echo(f"trying --speculative-config '{json.dumps(tuning.config)}'")
        folder = output / tuning.folder
        tried = measure_matrix(tuning.verify_settings(settings), loaded, folder, port)
        if tried == INTERRUPTED:
            return tried
        code, tuning = max(code, tried), tuning.with_verification(BenchRun.load(folder))
    _show_tuning(tuning, output)
    return code


def _show_tuning(tuning: Tuning, output: Path) -> None:
    """Print the table and the setting, write everything down.

    Raises:
        ViSpecError: the folder cannot be written.
    """
    from vllm_vispec.bench.tune import TUNE_FILE

    typer.echo(tuning.to_markdown() + "\n")
    for line in tuning.advice():
        typer.echo(line)
    write_json(output / TUNE_FILE, tuning.to_json())
    typer.echo(f"wrote {output / TUNE_FILE}")


def _show(text: str, found: dict[str, Any], output: Path | None) -> None:
    typer.echo(text)
    if output is not None:
        write_json(output, found)


def measure_matrix(settings: MatrixSettings, loaded: LoadedDataset, output: Path, port: int) -> int:
    """Measure, print what happened, return the exit code."""
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
        outcome = run_matrix(settings, loaded.samples, output, port, Tools(log=typer.echo))
    except KeyboardInterrupt:
        typer.echo("stopped: the same command goes on from here", err=True)
        return INTERRUPTED
    typer.echo(
        f"{outcome.measured} cells measured, {outcome.failed} failed, {outcome.found} were there; "
        f"see {output}"
    )
    return 1 if outcome.failed else 0
