"""The `vispec` command line. Everything heavy is imported on use."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_vispec.cli.bench import app as bench
from vllm_vispec.cli.evaluate import evaluate
from vllm_vispec.cli.options import exit_on_error
from vllm_vispec.cli.regenerate import regenerate
from vllm_vispec.cli.train import train
from vllm_vispec.cli.verify import verify
from vllm_vispec.cli.vocab import vocab

app = typer.Typer(
    name="vispec",
    help="Tools for ViSpec heads in vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or hub id of a head, any dialect.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    dialect: Annotated[
        str, typer.Option(help="canonical, or reference or automodel for their authors' tools.")
    ] = "canonical",
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: as stored.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Target, hub id or folder; a canonical head then finds it.")
    ] = None,
    drop_embed_tokens: Annotated[
        bool, typer.Option(help="Leave out the embedding table; the target's is used.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder written by vispec.")] = False,
) -> None:
    """Write a head of any dialect as a canonical folder (or back, with --dialect)."""
    from vllm_vispec.heads.convert import convert_head, guess_target, serve_command

    with exit_on_error():
        info = convert_head(
            source,
            destination,
            dialect=dialect,
            dtype=dtype,
            target=target,
            drop_embed_tokens=drop_embed_tokens,
            overwrite=overwrite,
        )
    section = info.config.vispec_section()
    typer.echo(f"wrote {info.folder} ({info.dtype}, {section['num_query_tokens']} query tokens)")
    typer.echo(f"serve it with: {serve_command(target or guess_target(info.config), info.folder)}")


@app.command()
def doctor(
    head: Annotated[
        str | None, typer.Option(help="Folder or hub id of a head to look at, too.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Folder or hub id of a target; says whether the head fits.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="List every patch point; say what trees need here.")
    ] = False,
) -> None:
    """Print versions, the runner that will be used, which features fit, and what a head needs."""
    from vllm_vispec.cli.doctor import head_lines, run_checks
    from vllm_vispec.cli.doctor_target import target_lines

    report = run_checks(verbose=verbose)
    for line in report.lines:
        typer.echo(line)
    if head is not None:
        typer.echo("")
        with exit_on_error():
            lines = head_lines(head)
        for line in lines:
            typer.echo(line)
    if target is not None:
        typer.echo("")
        with exit_on_error():
            lines = target_lines(target, head)
        for line in lines:
            typer.echo(line)
    if not report.ok:
        raise typer.Exit(1)


app.command()(regenerate)
app.command()(train)
app.command("eval")(evaluate)
app.command()(verify)
app.command()(vocab)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point of the console script."""
    if sys.argv[1:2] == ["doctor"]:
        _answer_and_exit()
    app()


def _answer_and_exit() -> None:
    """Run a command that writes nothing and holds nothing, without tidying up.

    To collect what vLLM's imports leave, and to take it apart at exit, costs two seconds in five.
    """
    gc.disable()
    try:
        app()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))
