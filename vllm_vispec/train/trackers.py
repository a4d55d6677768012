"""Where numbers of a run go besides metrics.jsonl: trackio, Weights & Biases, TensorBoard."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from vllm_vispec.utils.errors import ViSpecError


class Tracker(NamedTuple):
    """A tracker that was started.

    Attributes:
        log: takes numbers by name, and the step they belong to.
        close: says that the run is over.
    """

    log: Callable[[Mapping[str, float], int], Any]
    close: Callable[[], Any]


def open_trackers(
    names: Sequence[str], project: str, folder: Path, settings: Mapping[str, Any]
) -> list[Tracker]:
    """Start trackers. A run that goes on adds to what they have of it.

    Args:
        names: names in `TRACKERS`.
        project: what runs are listed under.
        folder: the run's output; its name is the run's.
        settings: the recipe, under dotted names.

    Raises:
        ViSpecError: one does not start.
    """
    try:
        return [TRACKERS[name].open(project, folder.absolute(), settings) for name in names]
    # Each has its own types for a missing login or a server that is not there.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ViSpecError(
            f"run.trackers {', '.join(names)} cannot start ({reason}): correct that or leave it out"
        ) from error


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed.

    Raises:
        ViSpecError: names the package.
    """
    for name in names:
        if name not in TRACKERS:
            raise ViSpecError(
                f"run.trackers {name!r} is unknown: use some of {', '.join(TRACKERS)}"
            )
        try:
            import_module(TRACKERS[name].module)
        except ImportError as error:
            raise ViSpecError(
                f"run.trackers names {name}, which cannot be imported ({error}): pip install {name}"
            ) from error


def numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers in nested values under names with slashes."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}/{name}")
        elif isinstance(value, (int, float)) and name != "step":
            yield f"{prefix}/{name}", float(value)


def _open_wandb(project: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    import wandb

    # The same folder is the same run.
    run_id = f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    run = wandb.init(
        project=project,
        name=folder.name,
        id=run_id,
        resume="allow",
        dir=str(folder),
        config=dict(settings),
    )
    return Tracker(lambda values, step: run.log(dict(values), step=step), run.finish)


def _open_trackio(project: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    import trackio

    trackio.init(project=project, name=folder.name, resume="allow", config=dict(settings))
    return Tracker(lambda values, step: trackio.log(dict(values), step=step), trackio.finish)


def _open_tensorboard(project: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


class _Known(NamedTuple):
    """What a tracker's package brings, and how to start it."""

    module: str
    open: Callable[[str, Path, Mapping[str, Any]], Tracker]


TRACKERS: Mapping[str, _Known] = {
    "trackio": _Known("trackio", _open_trackio),
    "wandb": _Known("wandb", _open_wandb),
    "tensorboard": _Known("torch.utils.tensorboard", _open_tensorboard),
}
