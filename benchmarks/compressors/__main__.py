"""Train and measure heads with every compressor: `python -m benchmarks.compressors`.

Run it again to go on after a stop; `--step` and `--variant` do a part.
"""

from __future__ import annotations

from pathlib import Path

import typer

from benchmarks.answers import ask_all
from benchmarks.compressors.findings import look_at_held_out, read_findings
from benchmarks.compressors.page import draw, to_markdown
from benchmarks.compressors.prefill import measure_prefill
from benchmarks.compressors.variants import REFERENCE, SCALING, VARIANTS
from benchmarks.report import publish
from benchmarks.study import EPOCHS, Study, Trained, study_command


def _measure(study: Study, with_prefill: bool) -> None:
    """Ask the engine; with the first seed also replay, gates and prefills."""
    ask_all(study)
    workspace = study.workspace
    trained = [one for one in study.heads(study.seeds[:1]) if workspace.head(one).is_dir()]
    look_at_held_out(workspace, study.target, trained)
    reference = Trained(VARIANTS[REFERENCE], EPOCHS, study.seeds[0])
    if with_prefill and workspace.head(reference).is_dir():
        heads = [one for one in trained if one.epochs == EPOCHS]
        measure_prefill(workspace, study.target, reference, heads)


def _report(study: Study, output: Path, page: Path) -> None:
    settings = study.settings() | {"scaling": SCALING}
    content = {"settings": settings, "rows": read_findings(study)}
    publish(output, page, content, to_markdown, draw)


main = study_command("compressors", VARIANTS, (0,), _measure, _report)

if __name__ == "__main__":
    typer.run(main)
