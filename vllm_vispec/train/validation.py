"""Simulated acceptance on held-out samples, shared out over the processes of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_vispec.evaluate.acceptance import (
    OVERALL,
    Acceptance,
    Families,
    merge_families,
)
from vllm_vispec.evaluate.simulate import simulate
from vllm_vispec.reference import Draft, decide
from vllm_vispec.train.batch import DraftBatch, pad_batch
from vllm_vispec.train.choices import Choices, count_choices, to_choices
from vllm_vispec.train.distributed import Processes
from vllm_vispec.train.source import Teacher


def validate(
    draft: Draft,
    teacher: Teacher,
    samples: Sequence[int],
    families: Sequence[str],
    num_draft_tokens: int,
    batch_size: int,
    group: Processes,
) -> tuple[Families, Choices]:
    """Acceptance over all samples, by family and overall, and the choices of the draft's gate.

    The same on every process; the gate draws nothing.

    Args:
        samples: held-out samples of the corpus, by index.
        families: the families among them.
        num_draft_tokens: K of the simulated chains.
    """
    mine = sorted(samples, key=lambda index: teacher.lengths[index])[group.rank :: group.world]
    found: Families = {}
    chosen = _no_choices(draft)
    for first in range(0, len(mine), batch_size):
        batch = pad_batch(teacher.observe(mine[first : first + batch_size]))
        part = simulate(draft, teacher.facts.lm_head_VD, batch, num_draft_tokens)
        found = merge_families(found, part)
        chosen = chosen + _choices(draft, batch)
    names = sorted({*families} - {""})
    rows = [_to_row(found.get(name), num_draft_tokens) for name in (*names, OVERALL)]
    totals = group.sum(torch.tensor(rows, dtype=torch.int64)).tolist()
    by_name = zip((*names, OVERALL), totals, strict=True)
    return (
        {name: _from_row(row) for name, row in by_name},
        to_choices(group.sum(chosen).tolist()),
    )


def _no_choices(draft: Draft) -> Tensor:
    spec = draft.config.compressor_spec
    return torch.zeros(2 * len(spec.primitives) if spec.gated else 0, dtype=torch.float64)


@torch.inference_mode()
def _choices(draft: Draft, batch: DraftBatch) -> Tensor:
    batch = batch.to(draft.weight.device)
    decision = decide(draft.compressor, batch.hidden_BLD, batch.answer_BL, batch.runs)
    if decision is None:
        return _no_choices(draft)
    return count_choices(decision.of_images()).double().cpu()


def _to_row(one: Acceptance | None, depth: int) -> list[int]:
    one = one or Acceptance.nothing(depth)
    return [one.rounds, one.tokens, one.answers, *one.accepted_by_position]


def _from_row(row: Sequence[int]) -> Acceptance:
    rounds, tokens, answers, *accepted = row
    return Acceptance(rounds, tokens, tuple(accepted), answers)
