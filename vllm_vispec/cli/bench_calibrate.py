"""`vispec bench calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vllm_vispec.cli.errors import exit_on_error


def calibrate(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of `vispec bench run`, or the JSON of `python -m benchmarks decode-speed`."
        ),
    ],
    target: Annotated[Path, typer.Option(help="Target's folder; config.json is enough.")],
    head: Annotated[Path, typer.Option(help="Head's folder, any dialect.")],
    side: Annotated[str, typer.Option(help="Side of the run beside plain.")] = "vispec",
    hold_out: Annotated[
        str, typer.Option(help="Cells to predict unseen: every-third, batch=16,32 or k=5.")
    ] = "every-third",
    dtype: Annotated[str | None, typer.Option(help="As measured; default: config.json's.")] = None,
    draft_vocab: Annotated[
        int | None, typer.Option(help="Rows of a smaller lm_head for the draft.")
    ] = None,
    context: Annotated[
        float | None, typer.Option(help="Tokens per sequence, where the file does not tell.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write rates and cells as JSON.")] = None,
) -> None:
    """Fit the cost model to some cells of a run and predict the others. Measures nothing."""
    from vllm_vispec.bench import estimate as model

    with exit_on_error():
        cells = model.read_measured(run, side, context)
        found = model.calibrate(
            cells,
            model.target_shape(target, dtype),
            model.draft_shape(head, target, dtype, draft_vocab),
            model.hold_out(hold_out),
        )
    typer.echo(found.to_markdown())
    typer.echo(found.cells_to_markdown())
    if output is not None:
        output.write_text(json.dumps(found.to_json(), indent=2) + "\n", encoding="utf-8")
