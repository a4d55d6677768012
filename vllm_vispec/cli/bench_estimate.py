"""`vispec bench estimate` and `vispec bench calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_vispec.bench.estimate import request as model
from vllm_vispec.cli.errors import exit_on_error
from vllm_vispec.cli.settings import options_of


@options_of(model.EstimateOptions)
def estimate(
    options: model.EstimateOptions,
    output: Annotated[Path | None, typer.Option(help="Write the estimates as JSON.")] = None,
) -> None:
    """Estimate decode_speedup from sizes, bandwidth, K and acceptance. Measures nothing."""
    found = model.estimate(options)
    _tell(model.estimate_to_markdown(found), found, output)


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
    from vllm_vispec.bench.estimate import calibrate as fit
    from vllm_vispec.bench.estimate.shapes import draft_shape, target_shape

    with exit_on_error():
        found = fit.calibrate(
            fit.read_measured(run, side, context),
            target_shape(target, dtype),
            draft_shape(head, target, dtype, draft_vocab),
            fit.hold_out(hold_out),
        )
    _tell(fit.calibration_to_markdown(found), found, output)


def _tell(text: str, found: dict[str, Any], output: Path | None) -> None:
    typer.echo(text)
    if output is not None:
        output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
