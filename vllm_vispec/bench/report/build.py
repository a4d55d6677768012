"""From a run to the report's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm_vispec.bench.bootstrap import RESAMPLES
from vllm_vispec.bench.report.blocks import Chapter, Document, Paragraph
from vllm_vispec.bench.report.facts import Facts
from vllm_vispec.bench.report.html import to_html
from vllm_vispec.bench.report.markdown import PLOTS, to_markdown
from vllm_vispec.bench.report.sections import SECTIONS, Section
from vllm_vispec.bench.schema import BenchRun
from vllm_vispec.train.files import write_text


@dataclass(frozen=True)
class ReportFiles:
    """What was written.

    Attributes:
        html: one page, complete in itself.
        markdown: the same; its pictures lie in `plots` beside it.
        plots: the pictures.
    """

    html: Path
    markdown: Path
    plots: tuple[Path, ...]


def make_report(run: BenchRun, resamples: int = RESAMPLES) -> Document:
    """Return the report of a run; equal runs give equal reports.

    Args:
        resamples: of every interval.
    """
    facts = Facts(run, resamples)
    target = run.settings.get("target") or "the target"
    title = f"Speculative decoding of {target}, measured against plain vLLM"
    return Document(title, tuple(_chapter(section, facts) for section in SECTIONS.values()))


def write_report(results: Path, output: Path, resamples: int = RESAMPLES) -> ReportFiles:
    """Turn a run into `report.html`, `report.md` and `plots/*.svg`.

    Args:
        results: folder of a run, or its JSON file.
        output: folder to write to; files of an earlier report are replaced.
        resamples: of every interval.

    Raises:
        ViSpecError: the run cannot be read, matplotlib is missing, or the folder cannot be written.
    """
    document = make_report(BenchRun.load(results), resamples)
    pictures = {output / PLOTS / f"{one.name}.svg": one.svg for one in document.figures}
    files = ReportFiles(output / "report.html", output / "report.md", tuple(pictures))
    for path, svg in pictures.items():
        write_text(path, svg)
    write_text(files.markdown, to_markdown(document))
    write_text(files.html, to_html(document))
    return files


def _chapter(section: Section, facts: Facts) -> Chapter:
    blocks = tuple(section.build(facts)) or (Paragraph(section.empty),)
    return Chapter(section.name, section.title, blocks)
