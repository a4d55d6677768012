"""Run the ablation: `python -m benchmarks.ablation`. Run it again to go on after a stop.

To use several cores, run `--step prepare` once, then one process per seed (`--seed 0 --step train
--step measure`), then `--step report`.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import typer

from benchmarks.ablation.arms import ARMS
from benchmarks.ablation.plot import draw
from benchmarks.ablation.results import make_rows, matched, read_all, to_markdown
from benchmarks.ablation.steps import Study, study_command
from benchmarks.report import publish


def _report(study: Study, output: Path, page: Path) -> None:
    found = read_all(study.workspace, study.arms, study.seeds)
    rows, gains = make_rows(found, study.arms, study.seeds), matched(found)
    content = {
        "settings": study.settings(),
        "vispec_over_eagle": {name: asdict(gain) for name, gain in gains.items()},
        "rows": [row.to_json() for row in rows],
    }
    publish(output, page, content, to_markdown(rows, gains), partial(draw, rows))


main = study_command("ablation", ARMS, (0, 1, 2), _report)

if __name__ == "__main__":
    typer.run(main)
