"""What a run tells while it goes on: a bar, metrics.jsonl, and the curve of tokens_per_round."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from vllm_vispec.evaluate.acceptance import OVERALL, Acceptance
from vllm_vispec.utils.files import write_json, write_text, writing

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Reporter:
    """Writes a run's progress; a silent one (other processes than the main one) does nothing.

    Args:
        folder: the run's output.
        step: step the run starts from; later lines of an earlier attempt are dropped.
        total: steps of the run, None if time ends it.
    """

    def __init__(self, folder: Path, step: int, total: int | None, silent: bool = False) -> None:
        self._folder, self._silent = folder, silent
        self._shown: dict[str, str] = {}
        if silent:
            return
        self._lines = _keep_until(folder / "metrics.jsonl", step)
        self._bar = tqdm(total=total, initial=step, desc="train", unit="step", mininterval=2)

    def say(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        if not self._silent:
            tqdm.write(text)

    def step(self, loss: float) -> None:
        """One more step is done."""
        if not self._silent:
            self._show(loss=f"{loss:.4f}")
            self._bar.update()

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl.

        Raises:
            ViSpecError: it cannot be written.
        """
        if not self._silent:
            self._lines.append({"kind": kind, **values})
            _append(self._folder / "metrics.jsonl", self._lines[-1])

    def validation(
        self,
        step: int,
        seconds: float,
        found: Mapping[str, Acceptance],
        more: Mapping[str, Any] = _NOTHING,
    ) -> None:
        """Print, log and draw the simulated acceptance of a validation; `more` is only logged."""
        if self._silent:
            return
        rates = {name: round(one.tokens_per_round, 4) for name, one in found.items()}
        self._show(tokens_per_round=f"{rates[OVERALL]:.3f}")
        families = ", ".join(f"{name} {rates[name]:.2f}" for name in rates if name != OVERALL)
        self.say(
            f"step {step}: tokens_per_round {rates[OVERALL]:.3f} on held-out data"
            + (f" ({families})" if families else "")
        )
        accept_rates = [round(rate, 4) for rate in found[OVERALL].accept_rates]
        self.log(
            "validation",
            {
                "step": step,
                "seconds": round(seconds, 2),
                "tokens_per_round": rates,
                "accept_rates": accept_rates,
                **more,
            },
        )
        self._draw()

    def close(self) -> None:
        """End the bar."""
        if not self._silent:
            self._bar.close()

    def _show(self, **values: str) -> None:
        self._shown |= values
        self._bar.set_postfix(self._shown, refresh=False)

    def _draw(self) -> None:
        points = [line for line in self._lines if line["kind"] == "validation"]
        write_json(self._folder / "curve.json", points)
        draw_curve(points, self._folder / "curve.png")


def draw_curve(points: list[dict[str, Any]], file: Path) -> None:
    """Plot tokens_per_round over steps, one line per family.

    Raises:
        ViSpecError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [point["step"] for point in points]
    for name in points[-1]["tokens_per_round"]:
        values = [point["tokens_per_round"].get(name) for point in points]
        style = {"color": "black", "linewidth": 2.5} if name == OVERALL else {"linewidth": 1}
        axes.plot(steps, values, marker=".", label=name, **style)
    axes.set(xlabel="step", ylabel="simulated tokens_per_round, held-out data")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with writing(file) as aside:
        figure.savefig(aside, format="png", dpi=120)


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
        if line["step"] <= step:
            lines.append(line)
    write_text(file, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def _append(file: Path, line: Mapping[str, Any]) -> None:
    from vllm_vispec.utils.errors import ViSpecError

    try:
        with file.open("a", encoding="utf-8") as sink:
            sink.write(json.dumps(line) + "\n")
    except OSError as error:
        raise ViSpecError(
            f"{file} cannot be written ({error.strerror}): free space, then run the same command "
            "again; what was saved before is intact"
        ) from error
