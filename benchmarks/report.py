"""What the studies share: the JSON file, a page with its tables, and pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_vispec.bench.machine import describe_machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110
COLORS = ("#4878a8", "#a85448", "#5a9a5a", "#8a6fb0", "#b08a3c", "#555555")
_WHOLE = 1e5  # digits before the point all stay
_INNERMOST = re.compile(r'[\[{](?:[^][{}"]|"(?:[^"\\]|\\.)*")*[\]}]')


def write_report(file: Path, content: Mapping[str, Any]) -> None:
    """Write a report as JSON: five digits of each number, innermost lists and objects on a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(content), indent=1)
    text = _INNERMOST.sub(lambda found: " ".join(found.group().split()), text)
    file.write_text(text + "\n", encoding="utf-8")
    print(f"written: {file}")


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    if isinstance(value, float) and abs(value) < _WHOLE:
        return float(f"{value:.5g}")
    return value


def publish(
    output: Path,
    page: Path,
    content: Mapping[str, Any],
    tables: Callable[[Mapping[str, Any]], str],
    draw: Callable[[Mapping[str, Any], Path], None],
) -> None:
    """Write a study's JSON, then make its tables and its picture from what the file says.

    Args:
        tables, draw: get the file's content; `python -m tools.docs --check` makes the tables again.
    """
    write_report(output, {"machine": describe_machine(), **content})
    written = json.loads(output.read_text(encoding="utf-8"))
    print(tables(written))
    text = replace_section(page.read_text(encoding="utf-8"), "tables", tables(written))
    page.write_text(text, encoding="utf-8")
    draw(written, page.with_suffix(".png"))


def replace_section(text: str, name: str, content: str) -> str:
    """Return a page with new content between ``<!-- name: ... -->`` and ``<!-- /name -->``.

    Raises:
        ValueError: The page does not have these markers once.
    """
    marked = re.compile(rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if len(marked.findall(text)) != 1:
        raise ValueError(f"<!-- {name}: ... --> and <!-- /{name} --> must be there once")
    return marked.sub(lambda found: found[1] + content.strip("\n") + "\n" + found[2], text)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first row is its head."""
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def new_figure(size_inches: tuple[float, float]) -> Figure:
    """Return an empty figure."""
    from matplotlib.figure import Figure

    return Figure(figsize=size_inches, layout="constrained")


def save(figure: Figure, file: Path) -> None:
    """Write a figure; the same numbers give the same file, because it names no version."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI, metadata={"Software": None})


def error_bars(found: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """Return how far the ends lie below and above the values, as matplotlib wants them.

    Args:
        found: "value" or "mean", "low" and "high" of each.
    """
    values = [one["value"] if "value" in one else one["mean"] for one in found]
    pairs = list(zip(values, found, strict=True))
    low = [max(value - one["low"], 0.0) for value, one in pairs]
    return [low, [max(one["high"] - value, 0.0) for value, one in pairs]]


def legend(axes: Any, **place: Any) -> None:
    """Add a legend where something has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", **place)
