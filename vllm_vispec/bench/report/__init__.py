"""`vispec bench report`: a run as Markdown and as one HTML page.

`facts` turns a run into one table of cells, `answers` says what follows from it, and the sentences
are in `bench/templates/report.md.j2`. The HTML page is that Markdown, rendered, with its pictures
inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vllm_vispec.utils.errors import ViSpecError

try:
    import matplotlib  # noqa: F401
    import pandas  # noqa: F401
except ImportError as error:
    raise ViSpecError(f"the report needs {error.name}: pip install 'vllm-vispec[bench]'") from error

from vllm_vispec.bench.bootstrap import RESAMPLES
from vllm_vispec.bench.pages import to_html, to_markdown
from vllm_vispec.bench.report.answers import answers
from vllm_vispec.bench.report.facts import Facts
from vllm_vispec.bench.report.plots import Chart
from vllm_vispec.bench.schema import BenchRun
from vllm_vispec.utils.files import write_text


@dataclass(frozen=True)
class Report:
    """A report as Markdown, which refers to its charts as `plots/NAME.svg`."""

    markdown: str
    charts: tuple[Chart, ...]

    @cached_property
    def pictures(self) -> dict[str, str]:
        """SVG by NAME."""
        return {chart.name: chart.draw() for chart in self.charts}

    @cached_property
    def html(self) -> str:
        """The same as one page, complete in itself."""
        return to_html(self.markdown, self.pictures)


@dataclass(frozen=True)
class ReportFiles:
    """Where a report was written: the page, and Markdown with its pictures beside it."""

    html: Path
    markdown: Path
    plots: tuple[Path, ...]


def make_report(run: BenchRun, resamples: int = RESAMPLES) -> Report:
    """Return the report of a run; equal runs give equal reports.

    Args:
        resamples: of every interval.
    """
    context = answers(Facts.of(run, resamples))
    return Report(to_markdown("report.md.j2", **context), context["charts"])


def write_report(results: Path, output: Path, resamples: int = RESAMPLES) -> ReportFiles:
    """Turn a run into `report.html`, `report.md` and `plots/*.svg`.

    Args:
        results: folder of a run, or its JSON file.
        output: folder to write to; files of an earlier report are replaced.
        resamples: of every interval.

    Raises:
        ViSpecError: the run cannot be read, or the folder cannot be written.
    """
    report = make_report(BenchRun.load(results), resamples)
    plots = {output / "plots" / f"{name}.svg": svg for name, svg in report.pictures.items()}
    files = ReportFiles(output / "report.html", output / "report.md", tuple(plots))
    for path, text in {**plots, files.markdown: report.markdown, files.html: report.html}.items():
        write_text(path, text)
    return files
