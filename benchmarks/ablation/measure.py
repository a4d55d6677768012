"""What the engine does with a head: acceptance on every question, speed on some of them.

The engine with the head and one without stay up side by side. Both answer the timed questions in
turns, at batch 1 and greedy; the others are answered by the head's engine alone and compared with
plain answers that are kept for all heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.ablation.arms import Cell
from benchmarks.ablation.workspace import Workspace
from examples.demo.compare import warm_up
from examples.demo.job import Answer, Job
from examples.demo.side import Side
from examples.tiny_vlm.families import FAMILIES
from vllm_vispec.evaluate.engine import inside_answer
from vllm_vispec.utils.files import write_json

NUM_DRAFT_TOKENS = 5


@dataclass(frozen=True)
class Asked:
    """One question answered with a head.

    Attributes:
        accepted: accepted draft tokens of every round, those behind the answer's end left out.
        decoded: tokens after the first.
        identical: whether the tokens are those of plain decoding.
        plain_seconds, draft_seconds: decode time of both sides; None if not timed.
    """

    family: str
    accepted: tuple[int, ...]
    decoded: int
    identical: bool
    plain_seconds: float | None = None
    draft_seconds: float | None = None

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Asked:
        """Read what `asdict` and JSON made of one."""
        return cls(**(fields | {"accepted": tuple(fields["accepted"])}))


@dataclass(frozen=True)
class Questions:
    """Held-out samples, `per_family` of each family; the first `timed` of them are timed."""

    per_family: int
    timed: int

    def family(self, sample: int) -> str:
        """Family of a sample by its number."""
        return tuple(FAMILIES)[sample // self.per_family]

    def all(self) -> range:
        """Numbers of all samples."""
        return range(self.per_family * len(FAMILIES))

    def is_timed(self, sample: int) -> bool:
        """Whether a sample is timed."""
        return sample % self.per_family < self.timed


def measure_all(
    workspace: Workspace, target: str, cells: Iterable[Cell], questions: Questions, threads: int
) -> None:
    """Measure every head that has no result yet."""
    missing = [cell for cell in cells if not workspace.measured(cell).is_file()]
    if not missing:
        return
    job = Job(model=target, per_family=questions.per_family)
    with _engine("plain", job, workspace, threads) as plain:
        expected = _plain_answers(workspace, plain, questions)
        for cell in missing:
            head = str(workspace.head(cell))
            with_head = replace(job, draft_model=head, num_speculative_tokens=NUM_DRAFT_TOKENS)
            with _engine(cell.name, with_head, workspace, threads) as drafting:
                asked = [
                    _ask(plain, drafting, sample, questions, expected) for sample in questions.all()
                ]
            write_json(workspace.measured(cell), [asdict(one) for one in asked])


@contextmanager
def _engine(name: str, job: Job, workspace: Workspace, threads: int) -> Iterator[Side]:
    with Side(name, job, workspace.log(f"engine-{name}"), threads) as side:
        warm_up(side, (0,))
        yield side


def _plain_answers(workspace: Workspace, plain: Side, questions: Questions) -> list[list[int]]:
    file = workspace.root / f"plain-{questions.per_family}.json"
    if not file.is_file():
        write_json(file, [plain.answer(sample).token_ids for sample in questions.all()])
    return list(json.loads(file.read_text()))


def _ask(
    plain: Side,
    drafting: Side,
    sample: int,
    questions: Questions,
    expected: Sequence[Sequence[int]],
) -> Asked:
    sides = [drafting]
    if questions.is_timed(sample):
        # Whoever comes second may find warmer caches.
        sides = [plain, drafting] if sample % 2 else [drafting, plain]
    answers = {side.name: side.answer(sample) for side in sides}
    mine, other = answers[drafting.name], answers.get(plain.name)
    accepted = inside_answer(mine.accepted_draft, len(mine.token_ids))
    return Asked(
        family=questions.family(sample),
        accepted=tuple(accepted),
        decoded=mine.num_decoded,
        identical=_same(mine, expected[sample]),
        plain_seconds=other.decode_seconds if other else None,
        draft_seconds=mine.decode_seconds if other else None,
    )


def _same(answer: Answer, token_ids: Sequence[int]) -> bool:
    return list(answer.token_ids) == list(token_ids)


def read_measured(file: Path) -> list[Asked]:
    """What `measure_all` wrote."""
    return [Asked.from_json(fields) for fields in json.loads(file.read_text())]
