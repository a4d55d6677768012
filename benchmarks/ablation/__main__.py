"""Run the ablation: `python -m benchmarks.ablation`. Run it again to go on after a stop.

To use several cores, run `--step prepare` once, then one process per seed (`--seed 0 --step train
--step measure`), then `--step report`.
"""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.ablation.arms import ARMS, EPOCHS, Arm, Cell
from benchmarks.ablation.data import prepare
from benchmarks.ablation.measure import NUM_DRAFT_TOKENS, Questions, measure_all
from benchmarks.ablation.plot import draw
from benchmarks.ablation.results import make_rows, matched, read_all, to_markdown
from benchmarks.ablation.training import RECIPE, fill_caches, train_arm
from benchmarks.ablation.workspace import Workspace
from benchmarks.report import write_report
from examples.pair import DEFAULT_MODEL, ModelOption
from vllm_vispec.bench.machine import describe_machine

DEFAULT_OUTPUT = Path("benchmarks/results/ablation.json")
DEFAULT_PAGE = Path("docs/ablation.md")
SEEDS = (0, 1, 2)
TABLE_MARKS = ("<!-- tables: begin -->", "<!-- tables: end -->")


class Step(StrEnum):
    """Parts of the run, in their order."""

    PREPARE = "prepare"
    TRAIN = "train"
    MEASURE = "measure"
    REPORT = "report"


def put_tables(page: Path, tables: str) -> None:
    """Replace what stands between the marks of the page."""
    begin, end = TABLE_MARKS
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(begin, 1)
    page.write_text(
        f"{before}{begin}\n\n{tables}\n\n{end}{rest.split(end, 1)[1]}", encoding="utf-8"
    )


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
    workspace, seeds = Workspace(work_dir.resolve()), tuple(seed or SEEDS)
    chosen, steps = _arms(arm), set(step or Step)
    questions = Questions(per_family, timed)
    cells = [Cell(one, epochs, s) for s in seeds for one in chosen for epochs in one.epochs]
    if Step.PREPARE in steps:
        prepare(workspace, model, samples, held_out, threads)
        fill_caches(workspace, model, chosen, threads)
    if Step.TRAIN in steps:
        for s in seeds:
            for one in chosen:
                train_arm(workspace, model, one, s, threads)
                print(f"trained: {one.name}, seed {s}", flush=True)
    if Step.MEASURE in steps:
        measure_all(workspace, model, cells, questions, threads)
    if Step.REPORT in steps:
        settings = {"samples": samples, "epochs": EPOCHS, "recipe": RECIPE, "seeds": seeds}
        settings |= {"num_speculative_tokens": NUM_DRAFT_TOKENS, "per_family": per_family}
        settings |= {"timed_per_family": timed, "threads": threads, "batch": 1, "temperature": 0}
        _report(workspace, chosen, seeds, settings, output, page)


def _arms(names: list[str] | None) -> list[Arm]:
    unknown = [name for name in names or () if name not in ARMS]
    if unknown:
        raise typer.BadParameter(f"--arm {unknown[0]} is unknown: use {', '.join(ARMS)}")
    return [ARMS[name] for name in names or ARMS]


def _report(
    workspace: Workspace,
    arms: list[Arm],
    seeds: tuple[int, ...],
    settings: dict[str, Any],
    output: Path,
    page: Path,
) -> None:
    found = read_all(workspace, arms, seeds)
    rows, gains = make_rows(found, arms, seeds), matched(found)
    tables = to_markdown(rows, gains)
    print(tables)
    content = {"machine": describe_machine(), "settings": settings}
    content["vispec_over_eagle"] = {name: asdict(gain) for name, gain in gains.items()}
    write_report(output, content | {"rows": [row.to_json() for row in rows]})
    put_tables(page, tables)
    draw(rows, page.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
