"""`vispec eval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_vispec.cli.options import options_of
from vllm_vispec.evaluate.options import EvalOptions


@options_of(EvalOptions)
def evaluate(
    options: EvalOptions,
    output: Annotated[Path | None, typer.Option(help="Write the numbers as JSON.")] = None,
) -> None:
    """Acceptance of a draft on recorded answers, simulated and, with --engine, measured.

    The simulation replays greedy chains over the answers. It says what the engine would do only
    where these are the target's own greedy answers: see --check-greedy.
    """
    from rich.console import Console

    from vllm_vispec.evaluate.report import make_table
    from vllm_vispec.evaluate.run import evaluate as run
    from vllm_vispec.utils.files import write_json

    report = run(options)
    # A file has room for names in full.
    Console(width=None if sys.stdout.isatty() else 400).print(make_table(report))
    for line in report.notes():
        typer.echo(line)
    if output is not None:
        write_json(output, report.to_json())
