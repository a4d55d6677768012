"""`vispec bench profile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_vispec.cli.errors import exit_on_error
from vllm_vispec.cli.options import AS_THEY_ARE, INTERRUPTED, number_of_image_tokens, split

if TYPE_CHECKING:
    from vllm_vispec.bench.profile import ProfileSettings


def profile(
    target: Annotated[str, typer.Option(help="Target: a folder or hub id.")],
    head: Annotated[str, typer.Option(help="ViSpec head: a folder or hub id.")],
    data: Annotated[Path, typer.Option(help="The dataset's file or folder.")],
    output: Annotated[Path, typer.Option(help="Folder for JSON, page and picture.")],
    dataset: Annotated[
        str, typer.Option(help="How to read --data: mmspec, vispec, openai or tiny.")
    ] = "openai",
    eagle_head: Annotated[
        str | None, typer.Option(help="Head for vLLM's EAGLE; default: one of --head's sizes.")
    ] = None,
    num_speculative_tokens: Annotated[
        int, typer.Option("--num-speculative-tokens", "-k", help="K.")
    ] = 4,
    runner: Annotated[
        str | None, typer.Option(help="vLLM's model runner, v1 or v2; default: v2 on a GPU.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests that are asked together.")] = 1,
    repetitions: Annotated[int, typer.Option(help="Of every question, besides a warm-up.")] = 3,
    limit: Annotated[int | None, typer.Option(help="Most samples; default: all.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; default: the dataset's.")
    ] = None,
    families: Annotated[str, typer.Option(help="Only these, separated by commas.")] = "",
    image_tokens: Annotated[
        str, typer.Option(help="Image tokens of a request, e.g. native,0,256.")
    ] = AS_THEY_ARE,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu on a busy machine without a GPU.")
    ] = "wall",
    serve: Annotated[str, typer.Option(help="vLLM's options for both engines, one string.")] = "",
    speculative_config: Annotated[
        str, typer.Option(help="""More for ViSpec's draft, e.g. '{"draft_vocab": 4096}'.""")
    ] = "",
) -> None:
    """Split rounds into target pass, draft passes, lm_head, sampling and host work.

    vLLM's own EAGLE and ViSpec take turns. Decoding and prefill rounds are shown apart.
    """

    def measure() -> None:
        from vllm_vispec.bench.profile import ProfileSettings, default_runner

        settings = ProfileSettings(
            target=target,
            head=head,
            data=str(data),
            dataset=dataset,
            eagle_head=eagle_head,
            num_speculative_tokens=num_speculative_tokens,
            runner=runner or default_runner(),
            concurrency=concurrency,
            repetitions=repetitions,
            limit=limit,
            max_tokens=max_tokens,
            families=split("--families", families, str),
            image_tokens=split("--image-tokens", image_tokens, number_of_image_tokens),
            clock=clock,
            serve=serve,
            speculative_config=speculative_config,
        )
        measure_profile(settings, output)

    with exit_on_error():
        measure()


def measure_profile(settings: ProfileSettings, output: Path) -> None:
    """Measure, print and say where the files are.

    Raises:
        ViSpecError: the profile cannot be made.
        typer.Exit: it was interrupted.
    """
    from vllm_vispec.bench.datasets import DatasetOptions, load_dataset
    from vllm_vispec.bench.profile import print_profile
    from vllm_vispec.bench.profile.run import Tools, run_profile

    options = DatasetOptions(
        families=settings.families, limit=settings.limit, max_tokens=settings.max_tokens
    )
    loaded = load_dataset(settings.dataset, Path(settings.data), options)
    for line in loaded.notes():
        typer.echo(line)
    try:
        found = run_profile(settings, loaded.samples, output, Tools(say=typer.echo))
    except KeyboardInterrupt as error:
        typer.echo("stopped: nothing was written", err=True)
        raise typer.Exit(INTERRUPTED) from error
    print_profile(found)
    typer.echo(f"wrote profile.json, profile.md, profile.svg and profile.png to {output}")
