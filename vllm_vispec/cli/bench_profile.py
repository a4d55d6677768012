"""`vispec bench profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_vispec.bench.profile.settings import ProfileSettings
from vllm_vispec.cli.options import INTERRUPTED
from vllm_vispec.cli.settings import options_of


@options_of(ProfileSettings)
def profile(
    settings: ProfileSettings,
    output: Annotated[Path, typer.Option(help="Folder for JSON, page and picture.")],
) -> int:
    """Split rounds into target pass, draft passes, lm_head, sampling and host work.

    vLLM's own EAGLE and ViSpec take turns. Decoding and prefill rounds are shown apart.
    """
    from vllm_vispec.bench.datasets import DatasetOptions, load_dataset
    from vllm_vispec.bench.profile.run import Tools, run_profile
    from vllm_vispec.bench.profile.tables import print_profile

    options = DatasetOptions(
        families=settings.families, limit=settings.limit, max_tokens=settings.max_tokens
    )
    loaded = load_dataset(settings.dataset, Path(settings.data), options)
    for line in loaded.notes():
        typer.echo(line)
    try:
        found = run_profile(settings, loaded.samples, output, Tools(say=typer.echo))
    except KeyboardInterrupt:
        typer.echo("stopped: nothing was written", err=True)
        return INTERRUPTED
    print_profile(found)
    typer.echo(f"wrote profile.json, profile.md, profile.svg and profile.png to {output}")
    return 0
