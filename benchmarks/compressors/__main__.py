"""Train and measure heads with every compressor: `python -m benchmarks.compressors`.

Run it again to go on after a stop; `--step` and `--arm` do a part.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import typer

from benchmarks.ablation.arms import EPOCHS, Cell
from benchmarks.ablation.steps import Study, study_command
from benchmarks.compressors.arms import ARMS, REFERENCE, SCALING
from benchmarks.compressors.findings import read_findings
from benchmarks.compressors.held_out import look_at_held_out
from benchmarks.compressors.plot import draw
from benchmarks.compressors.prefill import measure_prefill
from benchmarks.compressors.tables import all_tables
from benchmarks.report import publish


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
    content = {
        "settings": study.settings() | {"scaling": SCALING},
        "rows": [one.to_json() for one in findings],
    }
    publish(output, page, content, all_tables(findings), partial(draw, findings))


main = study_command("compressors", ARMS, (0,), _report, _measure_more)

if __name__ == "__main__":
    typer.run(main)
