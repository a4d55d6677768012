"""Draft trees beside chains and plain vLLM: `python -m benchmarks.trees`.

Run it again to go on after a stop. `--part` and `--draft` measure pieces of the grid; `--step
report` makes the tables and the picture from what there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.options import DraftOption, FamilyOption, ModelOption, ThreadsOption
from benchmarks.report import publish
from benchmarks.trees.grid import BATCHES, DRAFT_VLM, PARTS, VISPEC, Part, Questions
from benchmarks.trees.measure import Bench, measure
from benchmarks.trees.results import (
    PUBLISHED,
    draw,
    find_goals,
    find_losses,
    read_rows,
    to_markdown,
)
from examples.tiny_vlm.families import FAMILIES
from examples.tiny_vlm.shipped import DRAFT_VLM as DRAFT_VLM_FOLDER
from examples.tiny_vlm.shipped import HEAD, TARGET
from vllm_vispec.bench.profile_engine import default_runner

DEFAULT_OUTPUT = Path("benchmarks/results/trees.json")
DEFAULT_PAGE = Path("docs/evidence/trees.md")


class Step(StrEnum):
    """Parts of the run, in their order."""

    MEASURE = "measure"
    REPORT = "report"


def main(
    model: ModelOption = TARGET,
    draft_model: DraftOption = HEAD,
    draft_vlm: Annotated[
        str, typer.Option(help="Draft VLM: a folder or hub id.")
    ] = DRAFT_VLM_FOLDER,
    work_dir: Annotated[Path, typer.Option(help="Results so far, and logs.")] = Path("out/trees"),
    step: Annotated[list[Step] | None, typer.Option(help="Only these; repeat.")] = None,
    part: Annotated[list[Part] | None, typer.Option(help="Only these; repeat.")] = None,
    draft: Annotated[list[str] | None, typer.Option(help="Only these, by name; repeat.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Of part batch; repeat.")] = None,
    family: FamilyOption = None,
    per_family: Annotated[int, typer.Option(min=1, help="Questions at batch 1.")] = 4,
    per_batch_size: Annotated[int, typer.Option(min=1, help="Least questions of a size.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=2)] = 256,
    beside: Annotated[int, typer.Option(min=1, help="Drafts beside one plain engine.")] = 5,
    threads: ThreadsOption = 1,
    output: Annotated[Path, typer.Option(help="JSON file.")] = DEFAULT_OUTPUT,
    page: Annotated[Path, typer.Option(help="Page with the tables.")] = DEFAULT_PAGE,
) -> None:
    """Measure every draft that has no result yet, and report all results."""
    heads = {VISPEC: draft_model, DRAFT_VLM: draft_vlm}
    asked = Questions(
        per_family, tuple(family or FAMILIES), tuple(batch or BATCHES), per_batch_size
    )
    bench = Bench(work_dir.resolve(), model, heads, asked, beside, threads, max_tokens)
    if Step.MEASURE in (step or Step):
        measure_parts(bench, part or tuple(PARTS), draft or ())
    if Step.REPORT in (step or Step):
        report(bench, output, page)


def measure_parts(bench: Bench, parts: Sequence[Part], names: Sequence[str]) -> None:
    """Measure parts, or of them only the drafts of these names.

    Raises:
        typer.BadParameter: A name is unknown in these parts.
    """
    known = {draft.name for part in parts for draft in PARTS[part][1]}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"--draft {unknown[0]} is unknown: use {', '.join(sorted(known))}")
    for condition, drafts in (PARTS[part] for part in parts):
        measure(bench, condition, [one for one in drafts if not names or one.name in names])


def report(bench: Bench, output: Path, page: Path) -> None:
    """Write what there is: JSON, tables and picture."""
    rows = read_rows(bench)
    content = {
        "settings": settings(bench),
        "goals": find_goals(rows),
        "losses": find_losses(rows),
        "results": rows,
        "published": PUBLISHED,
    }
    publish(output, page, content, to_markdown, draw)


def settings(bench: Bench) -> dict[str, Any]:
    """What the JSON file says of the run."""
    return {
        "runner": default_runner(),
        "dtype": "float32",
        "threads": bench.threads,
        "max_tokens": bench.max_tokens,
        "drafts_beside_plain": bench.beside,
        **asdict(bench.questions),
    }


if __name__ == "__main__":
    typer.run(main)
