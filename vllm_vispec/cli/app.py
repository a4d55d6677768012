"""The `vispec` command line. Commands and all that is heavy are imported on use."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vllm_vispec.cli.options import exit_on_error
from vllm_vispec.utils.errors import ViSpecError

# Where the other commands are; these modules import what their options come from.
_COMMANDS = {
    "regenerate": "vllm_vispec.cli.regenerate:regenerate",
    "train": "vllm_vispec.cli.train:train",
    "eval": "vllm_vispec.cli.evaluate:evaluate",
    "verify": "vllm_vispec.cli.verify:verify",
    "vocab": "vllm_vispec.cli.vocab:vocab",
    "bench": "vllm_vispec.cli.bench:app",
}


class _Commands(TyperGroup):
    """The commands here and those of `_COMMANDS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *_COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _COMMANDS:
            return super().get_command(ctx, cmd_name)
        command = resolve_name(_COMMANDS[cmd_name])
        if isinstance(command, typer.Typer):
            found: Any = typer.main.get_group(command)
        else:
            alone = typer.Typer(add_completion=False)
            alone.command()(command)
            found = typer.main.get_command(alone)
        found.name = cmd_name
        return found


app = typer.Typer(
    name="vispec",
    cls=_Commands,
    help="Tools for ViSpec's drafts in vLLM: check, train, measure, share.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or hub id of a head.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    checkpoint_format: Annotated[
        str,
        typer.Option("--format", help="canonical, or another one for its authors' tools."),
    ] = "canonical",
    source_format: Annotated[
        str | None,
        typer.Option("--from", help="msd or eagle, which no folder tells apart; else found."),
    ] = None,
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
    dialect: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Write a head of any checkpoint format in the canonical one (or back, with --format)."""
    from vllm_vispec.heads.card import guess_target, serve_command, trained_bounds
    from vllm_vispec.heads.export import convert_head
    from vllm_vispec.heads.speculators import Serving

    with exit_on_error():
        if dialect is not None:
            raise ViSpecError(f"--dialect is now --format: use --format {dialect}")
        info = convert_head(
            source,
            destination,
            checkpoint_format=checkpoint_format,
            source_format=source_format,
            dtype=dtype,
            target=target,
            drop_embed_tokens=drop_embed_tokens,
            overwrite=overwrite,
        )
    queries = info.config.num_query_tokens
    typer.echo(f"wrote {info.folder} ({info.dtype}, {queries} query tokens)")
    serving = Serving(target or guess_target(info.config))
    typer.echo(f"serve it with: {serve_command(info.folder, serving, trained_bounds(info.folder))}")


@app.command()
def push(
    head: Annotated[Path, typer.Argument(help="Folder of a canonical head, as vispec writes it.")],
    repo: Annotated[str, typer.Argument(help="Repository on the hub, like org/name.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
) -> None:
    """Send a head with its model card to a hub; HF_TOKEN or `hf auth login` says who you are."""
    from vllm_vispec.heads.push import push_head

    with exit_on_error():
        typer.echo(f"pushed {head}: {push_head(head, repo, private=private)}")


@app.command()
def doctor(
    head: Annotated[
        str | None, typer.Option(help="Folder or hub id of a head to look at, too.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Folder or hub id of a target; says whether the head fits.")
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of a published model that drafts for --target."),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Longest prompt plus answer with --draft; default: the target's."),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="List every patch point; say what trees need here.")
    ] = False,
) -> None:
    """Print versions, the runner that will be used, which features fit, and what a head needs."""
    from vllm_vispec.cli.doctor import draft_lines, head_lines, run_checks, target_lines

    report = run_checks(verbose=verbose)
    found = [report.lines]
    try:
        with exit_on_error():
            if head is not None:
                found.append(head_lines(head))
            if target is not None:
                found.append(target_lines(target, head))
            if draft is not None:
                found.append(draft_lines(target, draft, max_model_len))
    finally:
        # Behind the error, if there is one.
        typer.echo("\n\n".join("\n".join(lines) for lines in found))
    if not report.ok:
        raise typer.Exit(1)


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
