"""What the studies share: the JSON file, a page with its tables, and pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vllm_vispec.bench.machine import describe_machine
from vllm_vispec.utils.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS, PAGES = Path("benchmarks/results"), Path("docs/evidence")
DPI = 110
COLORS = ("#4878a8", "#a85448", "#5a9a5a", "#8a6fb0", "#b08a3c", "#555555")
_WHOLE = 1e5  # digits before the point all stay
_INNERMOST = re.compile(r'[\[{](?:[^][{}"]|"(?:[^"\\]|\\.)*")*[\]}]')

Table = list[list[str]]
"""Rows of cells, the head first."""


def published(study: str) -> Any:
    """Return the figures of papers that a study's page shows."""
    text = Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)[study]


def write_report(file: Path, content: Mapping[str, Any]) -> None:
    """Write results and the machine as JSON.

    Numbers have five digits; innermost lists and objects are on one line.
    """
    text = json.dumps(_rounded({"machine": describe_machine(), **content}), indent=1)
    text = _INNERMOST.sub(lambda found: " ".join(found.group().split()), text)
    write_text(file, text + "\n")
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
    write_report(output, content)
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


def join_tables(tables: Iterable[tuple[str, Table]]) -> str:
    """Return the tables that have a row as Markdown, each below its title if that is not empty."""
    return "\n\n".join(
        (f"## {title}\n\n" if title else "") + _table(*rows)
        for title, rows in tables
        if len(rows) > 1
    )


def _table(head: Sequence[str], *rows: Sequence[str]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


@contextmanager
def picture(file: Path, size_inches: tuple[float, float]) -> Iterator[Figure]:
    """Give an empty figure and write it; the same numbers give the same file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inches, layout="constrained")
    yield figure
    # No version of the software in the file.
    figure.savefig(file, dpi=DPI, metadata={"Software": None})


def means_and_errors(found: Sequence[Mapping[str, float]]) -> tuple[list[float], list[list[float]]]:
    """Return the means, and how far the intervals reach below and above them, for matplotlib."""
    below = [max(one["mean"] - one["low"], 0.0) for one in found]
    above = [max(one["high"] - one["mean"], 0.0) for one in found]
    return [one["mean"] for one in found], [below, above]


def legend(axes: Any, **place: Any) -> None:
    """Add a legend where something has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", **place)
