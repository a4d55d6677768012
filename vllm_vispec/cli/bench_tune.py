"""`vispec bench tune`."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from vllm_vispec.cli.errors import exit_on_error
from vllm_vispec.cli.options import INTERRUPTED, split
from vllm_vispec.errors import ViSpecError

if TYPE_CHECKING:
    from vllm_vispec.bench.datasets import LoadedDataset
    from vllm_vispec.bench.matrix import MatrixSettings
    from vllm_vispec.bench.tune import Tuning

MEASURED = "measured"
T = TypeVar("T")


def tune(
    target: Annotated[str | None, typer.Option(help="Target: a folder or hub id.")] = None,
    data: Annotated[Path | None, typer.Option(help="The dataset's file or folder.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder; an earlier tuning in it is continued.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="ViSpec head: a folder or hub id.")] = None,
    run: Annotated[
        Path | None,
        typer.Option("--from", help="Choose from a run of `vispec bench run`, measure nothing."),
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="How to read --data: mmspec, vispec, openai or tiny.")
    ] = "openai",
    concurrency: Annotated[
        str, typer.Option(help="Requests in flight; the loads that are tuned.")
    ] = "1,2,4,8,16,32,64",
    num_speculative_tokens: Annotated[
        str, typer.Option("--num-speculative-tokens", "-k", help="K to choose from.")
    ] = "0,1,2,3,5",
    temperatures: Annotated[str, typer.Option(help="0 is greedy; several are averaged.")] = "0",
    repetitions: Annotated[int, typer.Option(help="Of every cell.")] = 3,
    waves: Annotated[int, typer.Option(help="Questions of a cell per request in flight.")] = 2,
    least: Annotated[int, typer.Option(help="Questions of a cell, at least.")] = 24,
    limit: Annotated[int | None, typer.Option(help="Most samples; default: all.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; default: the dataset's.")
    ] = None,
    serve: Annotated[str, typer.Option(help="Options of vllm serve, one string.")] = "",
    port: Annotated[int, typer.Option(help="First port of the servers; 0: any.")] = 0,
    by: Annotated[
        str, typer.Option(help="What counts: decode_speedup or e2e_speedup.")
    ] = "decode_speedup",
    verify: Annotated[
        bool, typer.Option(help="Serve with the setting and measure it against plain vLLM.")
    ] = True,
) -> None:
    """Find the K for every load on this machine and print the --speculative-config to use.

    Time never fails this: where the setting still loses, it says so.
    """

    def measure() -> int:
        from vllm_vispec.bench.datasets import DatasetOptions, load_dataset
        from vllm_vispec.bench.matrix import MatrixSettings

        if run is not None:
            return _from_run(run, output, by)
        settings = MatrixSettings(
            target=_needed("--target", target),
            dataset=dataset,
            head=_needed("--head", head),
            concurrency=tuple(sorted(split("--concurrency", concurrency, int))),
            num_speculative_tokens=split("-k", num_speculative_tokens, int),
            temperatures=split("--temperatures", temperatures, float),
            repetitions=repetitions,
            waves=waves,
            least=least,
            serve_args=tuple(shlex.split(serve)),
        )
        options = DatasetOptions(limit=limit, max_tokens=max_tokens)
        loaded = load_dataset(dataset, _needed("--data", data), options)
        return _measured(settings, loaded, _needed("--output", output), port, by, verify)

    with exit_on_error():
        raise typer.Exit(measure())


def _needed(flag: str, value: T | None) -> T:
    """Return an option's value.

    Raises:
        ViSpecError: it was not given.
    """
    if value is None:
        raise ViSpecError(f"{flag} is missing: give it, or --from with the folder of a run")
    return value


def _from_run(run: Path, output: Path | None, by: str) -> int:
    """Choose from what is there, return the exit code."""
    from vllm_vispec.bench.schema import BenchRun
    from vllm_vispec.bench.tune import Tuning

    tuning = Tuning.of(BenchRun.load(run), by)
    _tell(tuning, output or (run if run.is_dir() else run.parent))
    return 0


def _measured(
    settings: MatrixSettings, loaded: LoadedDataset, output: Path, port: int, by: str, verify: bool
) -> int:
    """Measure, choose, try the choice; return the exit code."""
    from vllm_vispec.bench.schema import BenchRun
    from vllm_vispec.bench.tune import Tuning, verdicts, verify_folder, verify_settings
    from vllm_vispec.cli.bench import measure_matrix

    code = measure_matrix(settings, loaded, output / MEASURED, port)
    if code == INTERRUPTED:
        return code
    # Cells of an earlier, wider call are used too.
    tuning = Tuning.of(BenchRun.load(output / MEASURED), by)
    if not verify or tuning.config is None:
        _tell(tuning, output)
        return code
    typer.echo(f"trying --speculative-config '{json.dumps(tuning.config)}'")
    folder = output / verify_folder(tuning)
    tried = measure_matrix(verify_settings(tuning, settings), loaded, folder, port)
    if tried == INTERRUPTED:
        return tried
    _tell(replace(tuning, verdicts=verdicts(tuning, BenchRun.load(folder))), output)
    return max(code, tried)


def _tell(tuning: Tuning, output: Path) -> None:
    """Print the table and the setting, write everything down.

    Raises:
        ViSpecError: the folder cannot be written.
    """
    from vllm_vispec.bench.tune import TUNE_FILE
    from vllm_vispec.train.files import write_json

    typer.echo(tuning.to_markdown() + "\n")
    for line in tuning.advice():
        typer.echo(line)
    file = output / TUNE_FILE
    write_json(file, tuning.to_json())
    typer.echo(f"wrote {file}")
