"""Train and measure heads with every compressor: `python -m benchmarks.compressors`.

Run it again to go on after a stop; `--step` and `--arm` do a part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.ablation.arms import EPOCHS, Cell
from benchmarks.ablation.measure import Questions
from benchmarks.ablation.steps import Step, Study, choose_arms, put_tables
from benchmarks.ablation.workspace import Workspace
from benchmarks.compressors.arms import ARMS, REFERENCE, SCALING
from benchmarks.compressors.findings import read_findings
from benchmarks.compressors.held_out import look_at_held_out
from benchmarks.compressors.plot import draw
from benchmarks.compressors.prefill import measure_prefill
from benchmarks.compressors.tables import all_tables
from benchmarks.report import write_report
from examples.pair import DEFAULT_MODEL, ModelOption
from vllm_vispec.bench.machine import describe_machine

DEFAULT_OUTPUT = Path("benchmarks/results/compressors.json")
DEFAULT_PAGE = Path("docs/compressors.md")
SEEDS = (0,)


def main(
    model: ModelOption = DEFAULT_MODEL,
    work_dir: Annotated[Path, typer.Option(help="Data, runs and results so far.")] = Path(
        "out/compressors"
    ),
    step: Annotated[list[Step] | None, typer.Option(help="Only these parts; repeat.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeat. Default: 0.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Repeat. Default: all.")] = None,
    samples: Annotated[int, typer.Option(min=32, help="To train on.")] = 1680,
    held_out: Annotated[int, typer.Option(min=7, help="For the curves of the runs.")] = 112,
    per_family: Annotated[int, typer.Option(min=1, help="Questions to the engine.")] = 4,
    timed: Annotated[int, typer.Option(min=1, help="Of these, timed.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of every process.")] = 1,
    prefill: Annotated[bool, typer.Option(help="Time the draft's part of prefills.")] = True,
    output: Annotated[Path, typer.Option(help="JSON file.")] = DEFAULT_OUTPUT,
    page: Annotated[Path, typer.Option(help="Page with the tables.")] = DEFAULT_PAGE,
) -> None:
    """Train and measure every arm with every seed."""
    study = Study(
        Workspace(work_dir.resolve()),
        model,
        choose_arms(arm, ARMS),
        tuple(seed or SEEDS),
        samples,
        held_out,
        Questions(per_family, timed),
        threads,
    )
    steps = set(step or Step)
    study.run(steps)
    if Step.MEASURE in steps:
        _measure_more(study, prefill)
    if Step.REPORT in steps:
        _report(study, output, page)


def _measure_more(study: Study, with_prefill: bool) -> None:
    """What the engine's questions do not say, with the first seed: replay, gates, prefills."""
    workspace = study.workspace
    trained = [
        cell
        for cell in study.cells
        if cell.seed == study.seeds[0] and workspace.head(cell).is_dir()
    ]
    look_at_held_out(workspace, study.target, trained)
    reference = Cell(ARMS[REFERENCE], EPOCHS, study.seeds[0])
    if with_prefill and workspace.head(reference).is_dir():
        cells = [cell for cell in trained if cell.epochs == EPOCHS]
        measure_prefill(workspace, study.target, reference, cells)


def _report(study: Study, output: Path, page: Path) -> None:
    findings = read_findings(study.workspace, study.arms, study.seeds)
    tables = all_tables(findings)
    print(tables)
    settings = study.settings() | {"scaling": SCALING}
    content = {"machine": describe_machine(), "settings": settings}
    write_report(output, content | {"rows": [one.to_json() for one in findings]})
    put_tables(page, tables)
    draw(findings, page.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
