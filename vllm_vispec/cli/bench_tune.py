"""`vispec bench tune`."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from vllm_vispec.bench.datasets.types import DatasetOptions
from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.cli.options import INTERRUPTED
from vllm_vispec.cli.settings import options_of
from vllm_vispec.utils.errors import ViSpecError

if TYPE_CHECKING:
    from vllm_vispec.bench.tune import Tuning

T = TypeVar("T")
MEASURED = "measured"


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
    return _measured(settings) if run is None else _from_run(run, settings.output, settings.by)


def _from_run(run: Path, output: Path | None, by: str) -> int:
    """Choose from what is there, return the exit code."""
    from vllm_vispec.bench.schema import BenchRun
    from vllm_vispec.bench.tune import Tuning

    tuning = Tuning.of(BenchRun.load(run), by)
    _tell(tuning, output or (run if run.is_dir() else run.parent))
    return 0


def _measured(given: TuneSettings) -> int:
    """Measure, choose, try the choice; return the exit code."""
    from vllm_vispec.bench.datasets.load import load_dataset
    from vllm_vispec.bench.schema import BenchRun
    from vllm_vispec.bench.tune import Tuning, verdicts, verify_folder, verify_settings
    from vllm_vispec.cli.bench import measure_matrix

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
    tuning = Tuning.of(BenchRun.load(output / MEASURED), given.by)
    if not given.verify or tuning.config is None:
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
    from vllm_vispec.utils.files import write_json

    typer.echo(tuning.to_markdown() + "\n")
    for line in tuning.advice():
        typer.echo(line)
    file = output / TUNE_FILE
    write_json(file, tuning.to_json())
    typer.echo(f"wrote {file}")
