"""Draft trees beside chains and plain vLLM: `python -m benchmarks.trees`.

Run it again to go on after a stop. `--part` and `--draft` measure pieces of the grid; `--step
report` makes the tables and the picture from what there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import FamilyOption, ThreadsOption, turns
from benchmarks.report import PAGES, RESULTS, publish
from benchmarks.study import choose
from benchmarks.trees import BATCHES, DRAFT_VLM, PARTS, SIBLING, VISPEC, Condition, Draft, Part
from benchmarks.trees.results import Row, draw, make_row, to_markdown
from benchmarks.turns import Job, Plan, read_measured
from examples.pair import DraftOption, ModelOption
from examples.tiny_vlm.families import FAMILIES
from examples.tiny_vlm.shipped import DRAFTS, HEAD, TARGET
from vllm_vispec.bench.machine import describe_machine
from vllm_vispec.bench.profile_engine import default_runner
from vllm_vispec.utils.files import read_json


class Step(StrEnum):
    """Parts of the run, in their order."""

    MEASURE = "measure"
    REPORT = "report"


@dataclass(frozen=True)
class Bench:
    """What a run measures with, and where it keeps results.

    Attributes:
        root: Working folder.
        target: Target folder or hub id.
        heads: Head folders or hub ids by `Draft.head`; drafts of others are left out.
        families: Of the questions.
        per_family: Questions of each family at batch 1.
        batches: Requests that are asked at a time.
        per_batch_size: Least questions that each of these sizes answers.
        beside: Drafts that take turns with one plain engine.
        threads: Of every engine.
    """

    root: Path
    target: str
    heads: Mapping[str, str]
    families: tuple[str, ...] = tuple(FAMILIES)
    per_family: int = 4
    batches: tuple[int, ...] = BATCHES
    per_batch_size: int = 32
    beside: int = turns.BESIDE
    threads: int = 1
    max_tokens: int = 256

    def file(self, condition: Condition, draft: Draft) -> Path:
        """Where a draft's result lies."""
        return self.root / "cells" / condition.name / f"{draft.name}.json"

    def count_per_family(self, condition: Condition) -> int:
        """Samples of each family; the largest batch asks no question twice."""
        most = max(*self.batches, self.per_batch_size)
        return -(-most // len(self.families)) if condition.has_batches else self.per_family

    def plan(self, condition: Condition) -> Plan:
        """What is asked at a time, families in turns so that every batch is a mixture."""
        count = self.count_per_family(condition)
        mixed = [
            (number * count + place, family)
            for place in range(count)
            for number, family in enumerate(self.families)
        ]
        calls: list[Sequence[tuple[int, str]]] = [[one] for one in mixed]
        if condition.has_batches:
            calls = [call for size in self.batches for call in self._of_size(mixed, size)]
        return [(tuple(s for s, _ in call), tuple(f for _, f in call)) for call in calls]

    def _of_size(
        self, mixed: Sequence[tuple[int, str]], size: int
    ) -> list[Sequence[tuple[int, str]]]:
        count = min(-(-self.per_batch_size // size), len(mixed) // size)
        return [mixed[i * size : (i + 1) * size] for i in range(count)]

    def job(self, condition: Condition, draft: Draft | None) -> Job:
        """Settings of an engine, None for plain vLLM."""
        engine: dict[str, Any] = {}
        if condition.has_batches:
            # All prompts of a call fit one pass, so that its requests decode side by side.
            size = max(self.batches)
            engine = {"max_num_seqs": size, "max_num_batched_tokens": 256 * max(size, 4)}
        speculative = None
        if draft is not None:
            model = self.heads[draft.head]
            speculative = {"method": "vispec", "model": model, **draft.speculative()}
        return Job(
            self.target,
            speculative,
            max_tokens=self.max_tokens,
            per_family=self.count_per_family(condition),
            families=self.families,
            engine=engine,
        )

    def measure(self, condition: Condition, drafts: Sequence[Draft]) -> None:
        """Measure every draft that has no result yet and whose head there is.

        Raises:
            ViSpecError: An engine failed.
        """
        turns.measure(
            {
                self.file(condition, draft): self.job(condition, draft)
                for draft in drafts
                if draft.head in self.heads
            },
            self.job(condition, None),
            self.plan(condition),
            self.root / "logs" / condition.name,
            threads=self.threads,
            temperature=condition.temperature,
            beside=self.beside,
        )

    def rows(self) -> list[Row]:
        """Rows of every part, as far as it was measured."""
        found = []
        for part, (condition, drafts) in PARTS.items():
            for draft in drafts:
                file = self.file(condition, draft)
                if file.is_file():
                    measured = read_measured(file)
                    for batch in sorted({call.batch for call in measured.calls}):
                        calls = [call for call in measured.calls if call.batch == batch]
                        found.append(make_row(part, draft, calls, measured.memory))
        return found

    def settings(self) -> dict[str, Any]:
        """What the JSON file says of the parts of a run."""
        return {
            "machine": describe_machine(),
            "runner": default_runner(),
            "dtype": "float32",
            "threads": self.threads,
            "max_tokens": self.max_tokens,
            "drafts_beside_plain": self.beside,
            "per_family": self.per_family,
            "families": self.families,
            "batches": self.batches,
            "per_batch_size": self.per_batch_size,
        }


def main(
    model: ModelOption = TARGET,
    draft_model: DraftOption = HEAD,
    draft_vlm: Annotated[str, typer.Option(help="Draft VLM: a folder or hub id.")] = DRAFTS[
        DRAFT_VLM
    ],
    sibling: Annotated[
        str, typer.Option(help="Model of the target's family: a folder or hub id.")
    ] = DRAFTS[SIBLING],
    work_dir: Annotated[Path, typer.Option(help="Results so far, and logs.")] = Path("out/trees"),
    step: Annotated[list[Step] | None, typer.Option(help="Only these; repeat.")] = None,
    part: Annotated[list[Part] | None, typer.Option(help="Only these; repeat.")] = None,
    draft: Annotated[list[str] | None, typer.Option(help="Only these, by name; repeat.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Of part batch; repeat.")] = None,
    family: FamilyOption = None,
    per_family: Annotated[int, typer.Option(min=1, help="Questions at batch 1.")] = 4,
    per_batch_size: Annotated[int, typer.Option(min=1, help="Least questions of a size.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=2)] = 256,
    beside: Annotated[
        int, typer.Option(min=1, help="Drafts beside one plain engine.")
    ] = turns.BESIDE,
    threads: ThreadsOption = 1,
    output: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "trees.json",
    page: Annotated[Path, typer.Option(help="Page with the tables.")] = PAGES / "trees.md",
) -> None:
    """Measure every draft that has no result yet, and report all results."""
    bench = Bench(
        work_dir.resolve(),
        model,
        {VISPEC: draft_model, DRAFT_VLM: draft_vlm, SIBLING: sibling},
        tuple(family or FAMILIES),
        per_family,
        tuple(batch or BATCHES),
        per_batch_size,
        beside,
        threads,
        max_tokens,
    )
    if Step.MEASURE in (step or Step):
        measure_parts(bench, part or tuple(PARTS), draft)
    if Step.REPORT in (step or Step):
        content = with_earlier(output, bench.rows(), bench.settings())
        publish(output, page, content, to_markdown, draw)


def with_earlier(file: Path, rows: Sequence[Row], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result file's content: the settings of each part, and rows.

    What the file has of parts that were not measured now stays, in front.
    """
    earlier = read_json(file) if file.is_file() else {"settings": {}, "results": []}
    measured = dict.fromkeys(row["part"] for row in rows)
    others = [row for row in earlier["results"] if row["part"] not in measured]
    return {
        "settings": earlier["settings"] | dict.fromkeys(measured, settings),
        "results": [*others, *rows],
    }


def measure_parts(bench: Bench, parts: Sequence[Part], names: Sequence[str] | None) -> None:
    """Measure parts, or of them only the drafts of these names.

    Raises:
        typer.BadParameter: A name is unknown in these parts.
    """
    known = dict.fromkeys(draft.name for part in parts for draft in PARTS[part][1])
    wanted = choose("--draft", names, known)
    for condition, drafts in (PARTS[part] for part in parts):
        bench.measure(condition, [one for one in drafts if one.name in wanted])


if __name__ == "__main__":
    typer.run(main)
