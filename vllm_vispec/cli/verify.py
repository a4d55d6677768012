"""`vispec verify`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vispec.cli.options import INTERRUPTED, exit_on_error
from vllm_vispec.utils.errors import ViSpecError

if TYPE_CHECKING:
    from vllm_vispec.verify.result import Verification
    from vllm_vispec.verify.settings import VerifySettings


def verify(
    target: Annotated[
        str | None, typer.Option(help="Target: a folder or hub id; default: the shipped pair's.")
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="Head: a folder or hub id, any dialect; default as above.")
    ] = None,
    num_speculative_tokens: Annotated[
        int,
        typer.Option("--num-speculative-tokens", "-k", min=1, help="Of the chain."),
    ] = 4,
    tree: Annotated[
        str, typer.Option(help="""The tree's setting, e.g. '{"depth": 5}'; JSON.""")
    ] = "{}",
    tree_nodes: Annotated[
        int, typer.Option(min=1, help="As --num-speculative-tokens, of the tree.")
    ] = 29,
    tensor_parallel_size: Annotated[int | None, typer.Option(help="As vLLM's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="As vLLM's.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="As vLLM's.")] = None,
    gpu_memory_utilization: Annotated[float | None, typer.Option(help="As vLLM's.")] = None,
    enforce_eager: Annotated[
        bool | None, typer.Option(help="As vLLM's; default: only without a GPU.")
    ] = None,
    attention_backend: Annotated[str | None, typer.Option(help="As vLLM's.")] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="As vLLM's.")] = None,
    engine_args: Annotated[
        str, typer.Option(help="""More of vLLM's engine arguments, e.g. '{"max_num_seqs": 16}'.""")
    ] = "{}",
    speculative_config: Annotated[
        str, typer.Option(help="""More for both drafts, e.g. '{"draft_vocab": 4096}'.""")
    ] = "{}",
    output: Annotated[
        Path, typer.Option(help="JSON to write; logs and the page are put beside it.")
    ] = Path("vispec-verify.json"),
) -> None:
    """Say whether a head works on this machine: equal answers, acceptance, attention, timings.

    Plain vLLM, chains and trees are started one after another with the options given. Exits with 1
    if a verdict is "failed".
    """
    named = {
        "tensor_parallel_size": tensor_parallel_size,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "gpu_memory_utilization": gpu_memory_utilization,
        "enforce_eager": enforce_eager,
        "attention_backend": attention_backend,
        "kv_cache_dtype": kv_cache_dtype,
    }
    with exit_on_error():
        from vllm_vispec.heads import inspect_head
        from vllm_vispec.verify.settings import VerifySettings, choose_pair

        pair = choose_pair(target, head)
        given = {name: value for name, value in named.items() if value is not None}
        settings = VerifySettings(
            *pair,
            num_speculative_tokens=num_speculative_tokens,
            tree=_json_object("--tree", tree),
            tree_nodes=tree_nodes,
            engine=_json_object("--engine-args", engine_args) | given,
            speculative_config=_json_object("--speculative-config", speculative_config),
        )
        # A head that cannot be read is known before an engine has started.
        inspect_head(settings.head)
        found = run(settings, output)
    raise typer.Exit(found.exit_status)


def run(settings: VerifySettings, output: Path) -> Verification:
    """Verify with a progress bar, print the page, write JSON and page.

    Raises:
        ViSpecError: the files cannot be written.
        typer.Exit: it was interrupted.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from vllm_vispec.utils.files import write_json, write_text
    from vllm_vispec.verify.page import WIDTH, print_page
    from vllm_vispec.verify.run import Tools, num_steps, verify

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(TextColumn("{task.description:40}"), *columns, transient=True) as progress:
        task = progress.add_task("", total=num_steps(), completed=-1)

        def step(what: str) -> None:
            progress.update(task, advance=1, description=what)
            if not progress.console.is_terminal and what.endswith("start"):
                typer.echo(what)

        try:
            found = verify(
                settings, output, shlex.join(["vispec", *sys.argv[1:]]), Tools(step=step)
            )
        except KeyboardInterrupt as error:
            typer.echo("stopped: nothing was written", err=True)
            raise typer.Exit(INTERRUPTED) from error
    console = Console(width=WIDTH, record=True)
    print_page(found, console)
    write_json(output, found.to_json())
    write_text(page := output.with_suffix(".txt"), console.export_text())
    typer.echo(f"wrote {output} and {page}")
    return found


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ViSpecError(f"{option} {text} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ViSpecError(f"""{option} {text}: give a JSON object, such as '{{"key": value}}'""")
    return content
