"""Ask plain vLLM and engines with drafts the same questions in turns, and keep what came back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.trees.grid import Condition, Draft, Questions
from benchmarks.turns import Call, Engine, Job, Memory, as_tuples, take_turns
from vllm_vispec.utils.files import write_json

PLAIN = "plain"


@dataclass(frozen=True)
class Measured:
    """What was measured with one draft."""

    memory: Memory | None
    calls: tuple[Call, ...]

    @classmethod
    def read(cls, file: Path) -> Measured:
        """Read what `measure` wrote."""
        fields = json.loads(file.read_text(encoding="utf-8"))
        memory = fields["memory"]
        calls = tuple(
            Call(**{name: as_tuples(value) for name, value in call.items()})
            for call in fields["calls"]
        )
        return cls(None if memory is None else Memory(**memory), calls)


@dataclass(frozen=True)
class Bench:
    """What a run measures with, and where it keeps results.

    Attributes:
        root: Working folder.
        target: Target folder or hub id.
        heads: Head folders or hub ids by `Draft.head`.
        beside: Drafts that take turns with one plain engine, so that it is paid for once.
        threads: Of every engine.
    """

    root: Path
    target: str
    heads: Mapping[str, str]
    questions: Questions
    beside: int = 4
    threads: int = 1
    max_tokens: int = 256

    def file(self, condition: Condition, draft: Draft) -> Path:
        """Where a draft's result lies."""
        return self.root / "cells" / condition.name / f"{draft.name}.json"

    def missing(self, condition: Condition, drafts: Iterable[Draft]) -> list[Draft]:
        """Drafts that were not measured yet and whose head there is."""
        return [
            draft
            for draft in drafts
            if draft.head in self.heads and not self.file(condition, draft).is_file()
        ]

    def job(self, condition: Condition, draft: Draft | None) -> Job:
        """Settings of an engine, None for plain vLLM."""
        engine: dict[str, Any] = {}
        if condition.has_batches:
            # All prompts of a call fit one pass, so that its requests decode side by side.
            size = max(self.questions.batches)
            engine = {"max_num_seqs": size, "max_num_batched_tokens": 256 * max(size, 4)}
        speculative = None
        if draft is not None:
            model = self.heads[draft.head]
            speculative = {"method": "vispec", "model": model, **draft.speculative()}
        return Job(
            self.target,
            speculative,
            max_tokens=self.max_tokens,
            per_family=self.questions.count_per_family(condition),
            families=self.questions.families,
            engine=engine,
        )


def measure(bench: Bench, condition: Condition, drafts: Sequence[Draft]) -> None:
    """Measure every draft that has no result yet.

    Raises:
        ViSpecError: An engine failed.
    """
    missing = bench.missing(condition, drafts)
    for begin in range(0, len(missing), bench.beside):
        together = missing[begin : begin + bench.beside]
        for draft, measured in zip(
            together, _side_by_side(bench, condition, together), strict=True
        ):
            write_json(bench.file(condition, draft), asdict(measured))
            print(f"measured: {condition.name}, {draft.label}", flush=True)


def _side_by_side(
    bench: Bench, condition: Condition, drafts: Sequence[Draft]
) -> Iterator[Measured]:
    with ExitStack() as stack:
        plain = stack.enter_context(_engine(bench, condition, None))
        engines = [stack.enter_context(_engine(bench, condition, draft)) for draft in drafts]
        plan = bench.questions.plan(condition)
        calls = list(take_turns(plain, engines, plan, condition.temperature))
        memories = [engine.memory() for engine in engines]
    for number, memory in enumerate(memories):
        yield Measured(memory, tuple(row[number] for row in calls))


def _engine(bench: Bench, condition: Condition, draft: Draft | None) -> Engine:
    name = draft.name if draft else PLAIN
    log_file = bench.root / "logs" / f"{condition.name}-{name}.log"
    return Engine(name, bench.job(condition, draft), log_file, bench.threads)
