"""The stacked bars of a profile: EAGLE next to ViSpec, every kind of round apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_vispec.bench.profile.parts import KINDS, PARTS, columns
from vllm_vispec.bench.profile.result import Profile
from vllm_vispec.bench.profile.settings import EAGLE, VISPEC
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (9.5, 5.5)
LABELS = {EAGLE: "EAGLE", VISPEC: "ViSpec"}
# Text as outlines, so that it looks the same everywhere; the same bytes for the same numbers.
_STYLE = {"svg.fonttype": "path", "svg.hashsalt": "vispec", "font.family": "DejaVu Sans"}
_NO_METADATA = {
    "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
    "png": {"Software": None},
}
PNG_DPI = 120


def draw(profile: Profile, folder: Path) -> tuple[Path, ...]:
    """Write `profile.svg` and `profile.png`; returns both.

    Raises:
        ViSpecError: matplotlib is not installed, or the folder cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ViSpecError(
            "the picture needs matplotlib: pip install 'vllm-vispec[bench]'"
        ) from error
    files = []
    with rc_context(_STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        _fill(figure, profile)
        for ending, metadata in _NO_METADATA.items():
            files.append(folder / f"profile.{ending}")
            with writing(files[-1]) as aside:
                figure.savefig(aside, format=ending, metadata=metadata, dpi=PNG_DPI)
    return tuple(files)


def _fill(figure: Figure, profile: Profile) -> None:
    drafts = profile.settings["num_speculative_tokens"]
    for place, kind in enumerate(KINDS, start=1):
        axes = figure.add_subplot(1, len(KINDS), place)
        for side in LABELS:
            _bar(axes, kind, side, profile.rounds[kind].typical[side], drafts)
        axes.set_title(KINDS[kind], fontsize="medium")
        axes.set_ylabel("ms")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.margins(x=0.15)
    figure.legend(handles=_legend(), loc="outside right center", fontsize="small")
    first = profile.notes[0]
    figure.suptitle(f"Where a round's time goes, K = {drafts}. {first}", fontsize="small")


def _bar(axes: Axes, kind: str, side: str, seconds: dict[str, float], drafts: int) -> None:
    bottom = 0.0
    for name, part in columns(kind, drafts).items():
        height = 1000 * seconds[name]
        axes.bar(
            LABELS[side], height, bottom=bottom, color=part.color, edgecolor="white", linewidth=0.5
        )
        bottom += height
    axes.text(LABELS[side], bottom, f"{bottom:.2f}", ha="center", va="bottom", fontsize="small")


def _legend() -> list:
    from matplotlib.patches import Patch

    # In the order of the bars, from the top.
    return [Patch(color=part.color, label=part.label) for part in reversed(PARTS)]
