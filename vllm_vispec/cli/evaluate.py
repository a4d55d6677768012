"""`vispec eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_vispec.cli.options import exit_on_error, json_object


def evaluate(
    target: Annotated[str, typer.Option(help="Target: a folder or hub id.")],
    head: Annotated[str, typer.Option(help="Head: a folder or hub id, any checkpoint format.")],
    data: Annotated[
        Path,
        typer.Option(
            help="JSONL of conversations whose answers are the target's own greedy ones, e.g. "
            "from `vispec regenerate --temperature 0`."
        ),
    ],
    image_root: Annotated[
        Path | None, typer.Option(help="Folder of relative image paths; default: that of --data.")
    ] = None,
    num_speculative_tokens: Annotated[
        int, typer.Option("--num-speculative-tokens", "-k", help="Draft tokens per round (K).")
    ] = 5,
    limit: Annotated[int | None, typer.Option(help="Look at the first records only.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the numbers as JSON.")] = None,
    engine: Annotated[
        bool, typer.Option(help="Measure the same questions with the engine, too.")
    ] = False,
    engine_args: Annotated[
        str, typer.Option(help="JSON object of further vllm.LLM settings for --engine.")
    ] = "{}",
    check_greedy: Annotated[
        bool, typer.Option(help="Report how many answer tokens are the target's greedy choice.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[
        str | None, typer.Option(help="Where to simulate; default: a GPU if there is one.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Conversations at once.")] = 4,
    max_length: Annotated[
        int, typer.Option(help="Longest conversation in tokens; longer ones are left out.")
    ] = 4096,
    draft_vocab: Annotated[
        str | None,
        typer.Option(help="Tokens that may be drafted: a list, auto, or how many; default: all."),
    ] = None,
) -> None:
    """Acceptance of a head on recorded answers, simulated and, with --engine, measured.

    The simulation replays greedy chains over the answers. It says what the engine would do only
    where these are the target's own greedy answers: see --check-greedy.
    """
    from rich.console import Console

    from vllm_vispec.evaluate.data import DataSource
    from vllm_vispec.evaluate.report import make_table
    from vllm_vispec.evaluate.run import EvalOptions
    from vllm_vispec.evaluate.run import evaluate as run

    with exit_on_error():
        options = EvalOptions(
            target=target,
            head=head,
            source=DataSource(data, image_root, limit),
            num_speculative_tokens=num_speculative_tokens,
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            max_length=max_length,
            check_greedy=check_greedy,
            engine=engine,
            draft_vocab=_number_or_text(draft_vocab),
            engine_args=json_object("--engine-args", engine_args),
        )
        report = run(options)
        Console().print(make_table(report))
        for line in report.notes():
            typer.echo(line)
        if output is not None:
            report.write(output)


def _number_or_text(value: str | None) -> str | int | None:
    return int(value) if value is not None and value.isdigit() else value
