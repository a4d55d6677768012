"""Ask plain vLLM and engines with drafts the same questions in turns, and keep what came back.

Several drafts wait beside one plain engine and take turns with it call by call, so that all of
them meet the same state of the machine and plain decoding is paid for once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.trees.grid import Condition, Draft, Questions
from benchmarks.trees.sides import BatchSide, Memory, Reply
from examples.demo.job import Job
from vllm_vispec.utils.files import write_json

PLAIN = "plain"


@dataclass(frozen=True)
class Call:
    """Samples answered together with a draft, beside plain vLLM.

    Attributes:
        families: of the samples.
        accepted: accepted draft tokens of every round, for each sample.
        decoded, plain_decoded: tokens after the first, for each sample.
        identical: whether the tokens are those of plain decoding; None where they need not be.
        seconds, plain_seconds: from the first token of the call to its last.
    """

    families: tuple[str, ...]
    accepted: tuple[tuple[int, ...], ...]
    decoded: tuple[int, ...]
    plain_decoded: tuple[int, ...]
    identical: tuple[bool, ...] | None
    seconds: float
    plain_seconds: float

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Call:
        """Read what `asdict` and JSON made of one."""
        values = {name: _tuples(value) for name, value in fields.items()}
        return cls(**values)

    @property
    def batch(self) -> int:
        """Requests at a time."""
        return len(self.families)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


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
        calls = tuple(Call.from_json(call) for call in fields["calls"])
        return cls(None if memory is None else Memory(**memory), calls)


@dataclass(frozen=True)
class Bench:
    """What a run measures with, and where it keeps results.

    Attributes:
        root: Working folder.
        target: Target folder or hub id.
        heads: Head folders or hub ids by `Draft.head`.
        beside: Drafts that take turns with one plain engine.
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
        common: dict[str, Any] = {
            "model": self.target,
            "max_tokens": self.max_tokens,
            "per_family": self.questions.count_per_family(condition),
            "families": self.questions.families,
        }
        if condition.has_batches:
            # All prompts of a call fit one pass, so that its requests decode side by side.
            size = max(self.questions.batches)
            common["engine"] = {"max_num_seqs": size, "max_num_batched_tokens": 256 * max(size, 4)}
        if draft is None:
            return Job(**common)
        return Job(
            **common,
            draft_model=self.heads[draft.head],
            num_speculative_tokens=draft.nodes,
            speculative=draft.speculative(),
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
        plain = stack.enter_context(_side(bench, condition, None))
        sides = [stack.enter_context(_side(bench, condition, draft)) for draft in drafts]
        calls = list(take_turns(plain, sides, bench.questions, condition))
        memories = [side.memory() for side in sides]
    for number, memory in enumerate(memories):
        yield Measured(memory, tuple(row[number] for row in calls))


def _side(bench: Bench, condition: Condition, draft: Draft | None) -> BatchSide:
    name = draft.name if draft else PLAIN
    log_file = bench.root / "logs" / f"{condition.name}-{name}.log"
    return BatchSide(name, bench.job(condition, draft), log_file, bench.threads)


def take_turns(
    plain: BatchSide, sides: Sequence[BatchSide], questions: Questions, condition: Condition
) -> Iterator[list[Call]]:
    """Yield, for every call, what each of the sides did beside plain vLLM."""
    everyone = [plain, *sides]
    plan = questions.calls(condition)
    for side in everyone:
        # Whatever happens once happens here, for the smallest and for the largest batch.
        for samples in {plan[0], plan[-1]}:
            side.ask(samples, condition.temperature)
    for number, samples in enumerate(plan):
        # Whoever comes later may find warmer caches.
        start = number % len(everyone)
        order = everyone[start:] + everyone[:start]
        replies = {side.name: side.ask(samples, condition.temperature) for side in order}
        families = tuple(questions.family(sample, condition) for sample in samples)
        yield [
            compare(families, replies[plain.name], replies[side.name], condition) for side in sides
        ]


def compare(families: tuple[str, ...], plain: Reply, mine: Reply, condition: Condition) -> Call:
    """Put both answers to a call side by side."""
    same = tuple(a == b for a, b in zip(plain.token_ids, mine.token_ids, strict=True))
    return Call(
        families,
        mine.accepted,
        tuple(len(ids) - 1 for ids in mine.token_ids),
        tuple(len(ids) - 1 for ids in plain.token_ids),
        same if condition.is_greedy else None,
        mine.decode_seconds,
        plain.decode_seconds,
    )
