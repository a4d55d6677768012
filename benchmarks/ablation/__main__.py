"""Run the ablation: `python -m benchmarks.ablation`. Run it again to go on after a stop.

To use several cores, run `--step prepare` once, then one process per seed (`--seed 0 --step train
--step measure`), then `--step report`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.ablation.arms import ARMS
from benchmarks.ablation.measure import Questions
from benchmarks.ablation.plot import draw
from benchmarks.ablation.results import make_rows, matched, read_all, to_markdown
from benchmarks.ablation.steps import Step, Study, choose_arms, put_tables
from benchmarks.ablation.workspace import Workspace
from benchmarks.report import write_report
from examples.pair import DEFAULT_MODEL, ModelOption
from vllm_vispec.bench.machine import describe_machine

DEFAULT_OUTPUT = Path("benchmarks/results/ablation.json")
DEFAULT_PAGE = Path("docs/ablation.md")
SEEDS = (0, 1, 2)


def main(
    model: ModelOption = DEFAULT_MODEL,
    work_dir: Annotated[Path, typer.Option(help="Data, runs and results so far.")] = Path(
        "out/ablation"
    ),
    step: Annotated[list[Step] | None, typer.Option(help="Only these parts; repeat.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Repeat. Default: 0 1 2.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Repeat. Default: all.")] = None,
    samples: Annotated[int, typer.Option(min=32, help="Of each training set.")] = 1680,
    held_out: Annotated[int, typer.Option(min=7, help="For the curves of the runs.")] = 112,
    per_family: Annotated[int, typer.Option(min=1, help="Questions to the engine.")] = 4,
    timed: Annotated[int, typer.Option(min=1, help="Of these, timed.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of every process.")] = 1,
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
    study.run(step or Step)
    if Step.REPORT in (step or Step):
        _report(study, output, page)


def _report(study: Study, output: Path, page: Path) -> None:
    found = read_all(study.workspace, study.arms, study.seeds)
    rows, gains = make_rows(found, study.arms, study.seeds), matched(found)
    tables = to_markdown(rows, gains)
    print(tables)
    content: dict[str, Any] = {"machine": describe_machine(), "settings": study.settings()}
    content["vispec_over_eagle"] = {name: asdict(gain) for name, gain in gains.items()}
    write_report(output, content | {"rows": [row.to_json() for row in rows]})
    put_tables(page, tables)
    draw(rows, page.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
