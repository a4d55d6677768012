"""`vispec bench estimate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_vispec.cli.errors import exit_on_error
from vllm_vispec.cli.options import split
from vllm_vispec.errors import ViSpecError

if TYPE_CHECKING:
    from vllm_vispec.bench.estimate import PassShape


def estimate(
    target: Annotated[
        Path | None, typer.Option(help="Target's folder; config.json is enough.")
    ] = None,
    head: Annotated[Path | None, typer.Option(help="Head's folder, any dialect.")] = None,
    device: Annotated[str | None, typer.Option(help="A GPU that is known by name.")] = None,
    bandwidth_gbs: Annotated[float | None, typer.Option(help="GB/s as reached.")] = None,
    tflops: Annotated[float | None, typer.Option(help="TFLOP/s as reached.")] = None,
    acceptance: Annotated[
        str, typer.Option(help="Share of rounds that accept each position, e.g. 0.8,0.6,0.5.")
    ] = "",
    acceptance_rate: Annotated[
        float | None, typer.Option(help="Probability at every position, given the one before.")
    ] = None,
    num_speculative_tokens: Annotated[
        str, typer.Option("--num-speculative-tokens", "-k", help="K.")
    ] = "1,2,3,4,5",
    batch_size: Annotated[
        str, typer.Option(help="Sequences decoded at once.")
    ] = "1,2,4,8,16,32,64",
    context: Annotated[float, typer.Option(help="Tokens of context per sequence.")] = 1024.0,
    draft_context: Annotated[
        float | None, typer.Option(help="Those that the draft reads; default: as many.")
    ] = None,
    draft_vocab: Annotated[
        int | None, typer.Option(help="Rows of a smaller lm_head for the draft.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Instead of config.json's.")] = None,
    bandwidth_share: Annotated[
        float | None, typer.Option(help="Share of a device's public bandwidth that is reached.")
    ] = None,
    compute_share: Annotated[
        float | None, typer.Option(help="Share of a device's public peak that is reached.")
    ] = None,
    pass_overhead_ms: Annotated[
        float | None, typer.Option(help="Of every pass, neither reading nor computing.")
    ] = None,
    target_parameters: Annotated[
        float | None, typer.Option(help="Instead of --target: weights a token passes.")
    ] = None,
    target_bytes_per_parameter: Annotated[float, typer.Option(help="E.g. 2 for bfloat16.")] = 2.0,
    head_parameters: Annotated[
        float | None, typer.Option(help="Instead of --head: weights a token passes.")
    ] = None,
    head_bytes_per_parameter: Annotated[float, typer.Option(help="E.g. 2 for bfloat16.")] = 2.0,
    target_kv_bytes_per_token: Annotated[
        float | None, typer.Option(help="With numbers: keys and values of a token, all layers.")
    ] = None,
    head_kv_bytes_per_token: Annotated[
        float | None, typer.Option(help="The same of the head's one layer.")
    ] = None,
    lm_head_parameters: Annotated[
        float, typer.Option(help="With numbers: hidden size times vocabulary.")
    ] = 0.0,
    output: Annotated[Path | None, typer.Option(help="Write the estimates as JSON.")] = None,
) -> None:
    """Estimate decode_speedup from sizes, bandwidth, K and acceptance. Measures nothing."""
    from vllm_vispec.bench import estimate as model

    with exit_on_error():
        given = {
            "bandwidth_share": bandwidth_share,
            "compute_share": compute_share,
            "pass_overhead_ms": pass_overhead_ms,
        }
        options = model.EstimateOptions(
            target=_shape(
                "target",
                target,
                target_parameters,
                lm_head_parameters,
                target_bytes_per_parameter,
                target_kv_bytes_per_token,
            ),
            head=_shape(
                "head",
                head,
                head_parameters,
                lm_head_parameters,
                head_bytes_per_parameter,
                head_kv_bytes_per_token,
            ),
            device=device,
            bandwidth_gbs=bandwidth_gbs,
            tflops=tflops,
            dtype=dtype,
            acceptance=split("--acceptance", acceptance, float) or None,
            acceptance_rate=acceptance_rate,
            num_speculative_tokens=split("-k", num_speculative_tokens, int),
            batch_sizes=split("--batch-size", batch_size, int),
            context=context,
            draft_context=draft_context,
            draft_vocab=draft_vocab,
            **{name: value for name, value in given.items() if value is not None},
        )
        table = model.estimate(options)
    typer.echo(table.to_markdown())
    if output is not None:
        output.write_text(json.dumps(table.to_json(), indent=2) + "\n", encoding="utf-8")


def _shape(
    name: str,
    folder: Path | None,
    parameters: float | None,
    lm_head: float,
    width: float,
    kv_bytes: float | None,
) -> Path | PassShape:
    """Return what the user gave: a folder or numbers.

    Raises:
        ViSpecError: both, or neither.
    """
    from vllm_vispec.bench.estimate import explicit_shape

    if (folder is None) == (parameters is None):
        raise ViSpecError(f"give either --{name} (a folder) or --{name}-parameters")
    if folder is not None:
        if kv_bytes is not None:
            raise ViSpecError(
                f"--{name}-kv-bytes-per-token goes with --{name}-parameters: leave it out, "
                f"{folder}/config.json tells it"
            )
        return folder
    assert parameters is not None
    return explicit_shape(parameters, lm_head, width, kv_bytes or 0.0)
