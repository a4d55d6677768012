"""`vispec train`: train a draft from a recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from vllm_vispec.cli.options import exit_on_error
from vllm_vispec.utils.errors import ViSpecError


def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML recipe, see examples/recipes.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a setting: section.name=value, or name=value. Repeatable.",
        ),
    ] = None,
    override: Annotated[
        str, typer.Option(help="Settings that may differ from the checkpoint's, with commas.")
    ] = "",
    cache_only: Annotated[
        bool, typer.Option(help="Only complete the offline cache of hidden states.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Only check everything and say what the run will cost.")
    ] = False,
    time: Annotated[
        bool, typer.Option("--time", help="With --dry-run: take 20 steps and say how long.")
    ] = False,
    explain: Annotated[
        bool, typer.Option(help="Print every setting, its default and its source.")
    ] = False,
    ray: Annotated[bool, typer.Option(help="Run as a Ray Train job.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes of the Ray job.")] = 1,
) -> None:
    """Train a draft. Run the same command again to go on after a stop or a crash.

    Several GPUs of one machine: torchrun --nproc-per-node N --no-python vispec train RECIPE.
    """
    from vllm_vispec.train.config import explain as explain_settings

    if explain:
        typer.echo(explain_settings())
        return
    with exit_on_error():
        if time and not dry_run:
            raise ViSpecError("--time belongs to --dry-run: add it")
        if time and ray:
            raise ViSpecError("--time takes its steps without Ray: leave out --ray")
        only = "cache" if cache_only else "time" if time else "costs" if dry_run else ""
        message = _train(recipe, settings or [], override, only, workers if ray else 0)
    if message:
        typer.echo(message)


def _train(
    recipe: Path | None,
    settings: list[str],
    names: str,
    only: str,
    ray_workers: int,
) -> str:
    from vllm_vispec.train.config import full_name, load_config
    from vllm_vispec.train.preflight import prepare, without_tables

    override = tuple(full_name(name.strip()) for name in names.split(",") if name.strip())
    config = load_config(recipe, settings).require_complete()
    if ray_workers and only in ("", "cache"):
        from vllm_vispec.train.ray_train import train_on_ray

        config = without_tables(config)
        prepare(config, ray_workers)
        return train_on_ray(config, ray_workers, override, only == "cache")
    from vllm_vispec.train.distributed import processes
    from vllm_vispec.train.loop import fill_cache, train

    with processes(config.run.device) as group:
        if group.is_main:
            without_tables(config)
        group.wait()
        config = without_tables(config)
        if only == "cache":
            message = fill_cache(config, group)
        elif only:
            from vllm_vispec.train.dry_run import dry_run

            group = replace(group, world=ray_workers or group.world)
            message = dry_run(config, group, only == "time")
        else:
            message = train(config, group, override).message
        return message if group.is_main else ""
