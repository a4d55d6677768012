"""`vispec bench`: measure, report, tune, profile, estimate. Everything heavy is imported on use."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_vispec.bench.calibrate import CalibrateOptions
from vllm_vispec.bench.datasets import DatasetOptions
from vllm_vispec.bench.estimate import EstimateOptions
from vllm_vispec.bench.matrix import MatrixSettings, is_path
from vllm_vispec.bench.profile import ProfileSettings
from vllm_vispec.cli.options import INTERRUPTED, exit_on_error, options_of
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import write_json

TINY_PAIR = "examples/tiny_vlm/checkpoints"
MEASURED = "measured"
PAIR = ("target", "dataset", "head", "serve_args")
COUNTS = ("repetitions", "waves", "least")
LESS = ("limit", "max_tokens")

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
    sides: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> int:
    """Measure a matrix of variants and settings, cell by cell, variants taking turns.

    They are servers on this machine, up at the same time; `vllm bench serve` makes the load.
    """
    if sides is not None:
        raise ViSpecError(f"--sides is now --variants: use --variants {sides}")
    return measure_matrix(settings, options, data, output, port)


@app.command()
@options_of(
    MatrixSettings,
    DatasetOptions,
    shown=("num_speculative_tokens", *PAIR, *LESS),
    defaults={
        "target": f"{TINY_PAIR}/target",
        "head": f"{TINY_PAIR}/vispec_head",
        "dataset": "tiny",
        "concurrency": (1, 4),
        "repetitions": 1,
        # Nothing depends on time here.
        "warm_up": 0,
        "limit": 12,
        "max_tokens": 64,
    },
)
def quick(
    settings: MatrixSettings,
    options: DatasetOptions,
    data: Annotated[Path, typer.Option(help="The dataset's file or folder.")],
    output: Annotated[Path | None, typer.Option(help="Folder; default: a temporary one.")] = None,
) -> int:
    """Check in minutes that outputs are plain vLLM's and acceptance is what it was.

    Fails if a floor is missed. Time is measured, but nothing depends on it.
    """
    from vllm_vispec.bench.quick import SERVE_ARGS, judge
    from vllm_vispec.bench.schema import BenchRun

    settings = settings.replace(serve_args=settings.serve_args or SERVE_ARGS)
    with tempfile.TemporaryDirectory(prefix="vispec-bench-") as scratch:
        folder = output or Path(scratch)
        measure_matrix(settings, options, data, folder)
        findings = list(judge(BenchRun.load(folder), settings))
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
    side: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Fit the cost model to some cells of a run and predict the others. Measures nothing."""
    from vllm_vispec.bench import calibrate as fit

    if side is not None:
        raise ViSpecError(f"--side is now --variant: use --variant {side}")
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
    from vllm_vispec.bench.pages import show
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
    show(to_page(found))
    typer.echo(f"wrote profile.json, profile.md, profile.svg and profile.png to {output}")
    return 0


@app.command()
@options_of(
    MatrixSettings,
    DatasetOptions,
    shown=("concurrency", "num_speculative_tokens", "temperatures", *PAIR, *COUNTS, *LESS),
    defaults={
        "target": "",
        # The variant vispec joins it once it is known that something is measured.
        "variants": ("plain",),
        "concurrency": (1, 2, 4, 8, 16, 32, 64),
        "num_speculative_tokens": (0, 1, 2, 3, 5),
    },
)
def tune(
    settings: MatrixSettings,
    options: DatasetOptions,
    data: Annotated[Path | None, typer.Option(help="The dataset's file or folder.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder; an earlier tuning in it is continued.")
    ] = None,
    port: Annotated[int, typer.Option(help="First port of the servers; 0: any.")] = 0,
    thresholds: Annotated[
        str,
        typer.Option(
            help="Of single paths that end early, each measured beside K: policy:threshold, e.g. "
            "spec_llava:0.1,spec_llava:0.3,entropy:0.1."
        ),
    ] = "",
    by: Annotated[
        str, typer.Option(help="What counts: decode_speedup or e2e_speedup.")
    ] = "decode_speedup",
    verify: Annotated[
        bool, typer.Option(help="Serve with the setting and measure it against plain vLLM.")
    ] = True,
    run: Annotated[
        Path | None,
        typer.Option("--from", help="Choose from a run of `vispec bench run`, measure nothing."),
    ] = None,
) -> int:
    """Find the K for every load, and a threshold; print the --speculative-config to use.

    Time never fails this: where the setting still loses, it says so.
    """
    from vllm_vispec.bench.schema import BenchRun
    from vllm_vispec.bench.tune import TUNE_FILE, Tuning

    code = 0
    if run is not None:
        tuning = Tuning.from_run(BenchRun.load(run), by)
        output = output or (run if run.is_dir() else run.parent)
    else:
        given = {"target": settings.target, "head": settings.head, "data": data, "output": output}
        for name, value in given.items():
            if not value:
                raise ViSpecError(
                    f"--{name} is missing: give it, or --from with the folder of a run"
                )
        assert data is not None
        assert output is not None
        concurrency = tuple(sorted(settings.concurrency))
        paths = [one.strip() for one in thresholds.split(",") if one.strip()]
        for one in paths:
            if not is_path(one):
                raise ViSpecError(
                    f"--thresholds {one}: write a policy and a threshold, like spec_llava:0.3"
                )
        variants = ("plain", "vispec", *paths)
        settings = settings.replace(variants=variants, concurrency=concurrency)
        code = measure_matrix(settings, options, data, output / MEASURED, port)
        if code == INTERRUPTED:
            return code
        # Cells of an earlier, wider call are used too.
        tuning = Tuning.from_run(BenchRun.load(output / MEASURED), by)
        if verify and tuning.config is not None:
            typer.echo(f"trying --speculative-config '{json.dumps(tuning.config)}'")
            folder = output / tuning.folder
            tried = measure_matrix(tuning.verify_settings(settings), options, data, folder, port)
            if tried == INTERRUPTED:
                return tried
            code, tuning = max(code, tried), tuning.with_verification(BenchRun.load(folder))
    typer.echo(tuning.to_markdown(), nl=False)
    write_json(output / TUNE_FILE, tuning.to_json())
    typer.echo(f"wrote {output / TUNE_FILE}")
    return code


def _show(text: str, found: dict[str, Any], output: Path | None) -> None:
    typer.echo(text)
    if output is not None:
        write_json(output, found)


def measure_matrix(
    settings: MatrixSettings, options: DatasetOptions, data: Path, output: Path, port: int = 0
) -> int:
    """Measure, print what happened, return the exit code."""
    from vllm_vispec.bench.datasets import load_dataset
    from vllm_vispec.bench.runner import Tools, run_matrix

    loaded = load_dataset(settings.dataset, data, options)
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
