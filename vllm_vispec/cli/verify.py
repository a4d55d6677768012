"""`vispec verify`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_vispec.cli.options import INTERRUPTED, options_of
from vllm_vispec.verify.run import EngineOptions, Verifier, VerifySettings

if TYPE_CHECKING:
    from vllm_vispec.verify.result import Verification


@options_of(VerifySettings, EngineOptions)
def verify(
    settings: VerifySettings,
    engine: EngineOptions,
    output: Annotated[
        Path, typer.Option(help="JSON to write; logs and the page are put beside it.")
    ] = Path("vispec-verify.json"),
) -> int:
    """Say whether a draft works on this machine: equal answers, acceptance, attention, timings.

    Plain vLLM, chains and trees are started one after another with the options given. Exits with 1
    if a verdict is "failed".
    """
    from vllm_vispec.draft_model.named import check_draft

    # A draft that cannot be used is known before an engine has started.
    check_draft(settings.head, settings.target)
    args = settings.engine | engine.model_dump(exclude_none=True)
    return run(settings.model_copy(update={"engine": args}), output).exit_status


def run(settings: VerifySettings, output: Path) -> Verification:
    """Verify with a progress bar, print the page, write JSON and page.

    Raises:
        ViSpecError: the files cannot be written.
        typer.Exit: it was interrupted.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from vllm_vispec.bench.pages import show
    from vllm_vispec.utils.files import write_json, write_text

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(TextColumn("{task.description:40}"), *columns, transient=True) as progress:

        def step(what: str) -> None:
            progress.update(task, advance=1, description=what)
            if not progress.console.is_terminal and what.endswith("start"):
                typer.echo(what)

        verifier = Verifier(settings, output, step)
        task = progress.add_task("", total=verifier.num_steps, completed=-1)
        try:
            found = verifier.verify(shlex.join(["vispec", *sys.argv[1:]]))
        except KeyboardInterrupt as error:
            typer.echo("stopped: nothing was written", err=True)
            raise typer.Exit(INTERRUPTED) from error
    text = found.to_markdown()
    show(text)
    write_json(output, found.model_dump(mode="json"))
    write_text(page := output.with_suffix(".txt"), text)
    typer.echo(f"wrote {output} and {page}")
    return found
