"""What a profile says: medians, deciles and ratios with intervals, in tables and as stacked bars.

Arrays: S sides, R steps, C columns (parts, then wholes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_vispec.bench.bootstrap import bootstrap
from vllm_vispec.bench.metrics import Numbers
from vllm_vispec.bench.pages import to_markdown
from vllm_vispec.bench.profile_steps import KINDS, PARTS, SIDES, WHOLES, Block, columns
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import writing

DECILES = (0.1, 0.9)
# Text as outlines, so that it looks the same everywhere; the same bytes for the same numbers.
_STYLE = {"svg.fonttype": "path", "svg.hashsalt": "vispec", "font.family": "DejaVu Sans"}
_NO_METADATA = {
    "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
    "png": {"Software": None},
}


def summarise(blocks: Sequence[Block]) -> dict[str, Any]:
    """Compare the steps of blocks, all of one kind and split alike.

    A resample of an interval draws blocks with replacement, the same for both sides: it answers how
    different a number might be for other questions of the kind or at another minute of the run.

    Args:
        blocks: at least one with a step.

    Returns:
        The number of `steps` on each side, and by name `parts` and `wholes`. Of each, `eagle` and
        `vispec` have seconds: the median; the first decile, which is what something costs while
        nothing else disturbs the machine; and the mean over the steps whose time lies between the
        first and the last decile (`typical`: unlike medians these add up to a step). The ratios are
        ViSpec's over EAGLE's, of medians with its 95 % interval and of first deciles; None where
        EAGLE has no such part, or a single block no interval.
    """
    blocks = [block for block in blocks if block]
    first = blocks[0][0][0]
    names = [*first.seconds, *first.wholes]
    tables = np.empty((len(SIDES), len(blocks)), dtype=object)
    for number, block in enumerate(blocks):
        for side, steps in enumerate(zip(*block, strict=True)):
            rows = [[*one.seconds.values(), *one.wholes.values()] for one in steps]
            tables[side, number] = np.array(rows)
    pooled_SRC = np.stack([np.concatenate(list(side)) for side in tables])
    figures_SC = {
        "median": np.median(pooled_SRC, axis=1),
        "first_decile": np.quantile(pooled_SRC, DECILES[0], axis=1),
        "typical": np.stack([_typical(table, names.index("step")) for table in pooled_SRC]),
    }
    low_C, high_C = np.full((2, len(names)), np.nan)
    if len(blocks) > 1:
        low_C, high_C = bootstrap(tables, (1,), _ratio_of_medians)
    ratios_C = {
        "ratio": _divide(*figures_SC["median"]),
        "ratio_low": low_C,
        "ratio_high": high_C,
        "ratio_first_decile": _divide(*figures_SC["first_decile"]),
    }
    found: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(names):
        found[name] = {
            side: {figure: float(values[number, place]) for figure, values in figures_SC.items()}
            for number, side in enumerate(SIDES)
        }
        for ratio, values in ratios_C.items():
            found[name][ratio] = None if np.isnan(values[place]) else float(values[place])
    return {
        "steps": pooled_SRC.shape[1],
        "parts": {name: found[name] for name in first.seconds},
        "wholes": {name: found[name] for name in first.wholes},
    }


def by_image_tokens(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Summarise prefills by their number of image tokens and of requests, fewest first."""
    keys = sorted({(eagle.image_tokens, eagle.requests) for block in blocks for eagle, _ in block})
    found = []
    for tokens, requests in keys:
        chosen = [
            [p for p in block if (p[0].image_tokens, p[0].requests) == (tokens, requests)]
            for block in blocks
        ]
        found.append({"image_tokens": tokens, "requests": requests, **summarise(chosen)})
    return found


def _ratio_of_medians(drawn: NDArray[Any]) -> Numbers:
    """Return ViSpec's median over EAGLE's, ``[C]``; NaN where EAGLE has none."""
    return _divide(*(np.median(np.concatenate(list(side)), axis=0) for side in drawn))


def _divide(eagle: Numbers, vispec: Numbers) -> Numbers:
    return np.divide(vispec, eagle, out=np.full_like(eagle, np.nan), where=eagle > 0)


def _typical(table_RC: Numbers, step_column: int) -> Numbers:
    totals = table_RC[:, step_column]
    low, high = np.quantile(totals, DECILES)
    middle = (totals >= low) & (totals <= high)
    # Of two steps none lies between the deciles.
    return (table_RC[middle] if middle.any() else table_RC).mean(axis=0)


def to_page(profile: Mapping[str, Any]) -> str:
    """Return the profile as Markdown; its picture is `profile.svg` beside it."""
    parts = columns(profile["settings"]["num_speculative_tokens"])
    labels = WHOLES | {name: part.label for name, part in parts.items()}
    return to_markdown("profile.md.j2", profile=profile, kinds=KINDS, labels=labels)


def draw(profile: Mapping[str, Any], folder: Path) -> None:
    """Write `profile.svg` and `profile.png`: every kind of step apart.

    Raises:
        ViSpecError: matplotlib is not installed, or the folder cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ViSpecError(
            "the picture needs matplotlib: pip install 'vllm-vispec[bench]'"
        ) from error
    settings = profile["settings"]
    drafts, clock, runner = (settings[x] for x in ("num_speculative_tokens", "clock", "runner"))
    with rc_context(_STYLE):
        figure = Figure(figsize=(9.5, 5.5), layout="constrained")
        for axes, (kind, title) in zip(figure.subplots(1, 2), KINDS.items(), strict=True):
            tops = np.zeros(len(SIDES))
            for name, part in columns(drafts).items():
                seconds = [profile[kind]["parts"][name][side]["typical"] for side in SIDES]
                heights = 1000 * np.array(seconds)
                look = {"color": part.color, "edgecolor": "white", "linewidth": 0.5}
                bars = axes.bar(("EAGLE", "ViSpec"), heights, bottom=tops, **look)
                tops += heights
            axes.bar_label(bars, [f"{top:.2f}" for top in tops], fontsize="small")
            axes.set_title(title, fontsize="medium")
            axes.set_ylabel("ms")
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
            axes.margins(x=0.15)
        # In the order of the bars, from the top.
        legend = [Patch(color=part.color, label=part.label) for part in reversed(PARTS.values())]
        figure.legend(handles=legend, loc="outside right center", fontsize="small")
        title = f"Where a step's time goes: {runner} runner, K = {drafts}, {clock} time"
        figure.suptitle(title, fontsize="small")
        for ending, metadata in _NO_METADATA.items():
            with writing(folder / f"profile.{ending}") as aside:
                figure.savefig(aside, format=ending, metadata=metadata, dpi=120)
