"""Acceptance of greedy chains replayed over recorded answers, without an engine.

Pass s of an exact rollout computes, at row p, the (s + 1)-th draft token of the chain that begins
at row p - s, given that the chain was right so far. A step accepts the leading right tokens, then
the target adds its bonus token, and the next step begins behind it. On the target's own greedy
answers this is what the engine does under greedy decoding, up to rounding.

Tensor names end in their shape: B samples, L rows, N counted rows, S passes, D hidden, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_vispec.reference import Draft, decide
from vllm_vispec.train.batch import DraftBatch, pad_batch
from vllm_vispec.train.distributed import Processes
from vllm_vispec.train.metrics import (
    OVERALL,
    Acceptance,
    Families,
    GateDecisions,
    by_family,
    merge_families,
    sum_decisions,
)
from vllm_vispec.train.rollout import PassOutput, rollout
from vllm_vispec.train.teacher import Teacher
from vllm_vispec.utils.errors import ViSpecError

# Rows whose logits are held at once; a vocabulary of 150,000 then takes 300 MB in float32.
ROWS_AT_ONCE = 512


@torch.inference_mode()
def simulate(
    draft: Draft,
    lm_head_VD: Tensor,
    batch: DraftBatch,
    num_draft_tokens: int,
    token_ids_V: Tensor | None = None,
) -> Families:
    """Return the acceptance of greedy chains of `num_draft_tokens`, by family and "overall".

    Every assistant turn is a generation of its own whose prompt is everything before it. Computes
    in the dtype of the draft; logits in the dtype of the lm_head that reads it.

    Args:
        lm_head_VD: the target's lm_head, or some of its rows.
        batch: samples whose answers are the target's own greedy ones.
        token_ids_V: the tokens of these rows; None: all of the target's.

    Raises:
        ViSpecError: `num_draft_tokens` is not at least 1.
    """
    if num_draft_tokens < 1:
        raise ViSpecError(f"num_draft_tokens={num_draft_tokens} drafts nothing: use at least 1")
    weight = draft.weight
    hits_SBL = draft_hits(
        draft, lm_head_VD, batch.to(weight.device, weight.dtype), num_draft_tokens, token_ids_V
    )
    results: list[Families] = [{OVERALL: Acceptance.nothing(num_draft_tokens)}]
    for sample, family in enumerate(batch.families):
        hits = hits_SBL[:, sample].tolist()
        for start, end in answer_spans(batch.answer_BL[sample].tolist()):
            accepted = replay(hits, start, end)
            one = Acceptance.of_answer(accepted, end - start, num_draft_tokens)
            results.append(by_family(family, one))
    return merge_families(*results)


def draft_hits(
    draft: Draft,
    lm_head_VD: Tensor,
    batch: DraftBatch,
    num_draft_tokens: int,
    token_ids_V: Tensor | None = None,
) -> Tensor:
    """Return where pass s at row p drafts answer token p + 2: bool [S, B, L], on the CPU."""
    gold_BL = F.pad(batch.ids_BL[:, 2:], (0, 2))
    passes = rollout(draft, batch, draft.distinct_passes(num_draft_tokens))
    head_VD = draft.output_head(lm_head_VD, token_ids_V)
    hits = [_hits_of_pass(one, gold_BL, head_VD, token_ids_V) for one in passes]
    hits += hits[-1:] * (num_draft_tokens - len(hits))
    return torch.stack(hits).cpu()


def _hits_of_pass(
    one: PassOutput, gold_BL: Tensor, lm_head_VD: Tensor, token_ids_V: Tensor | None
) -> Tensor:
    def choose(states: Tensor) -> Tensor:
        rows = F.linear(states.to(lm_head_VD), lm_head_VD).argmax(-1)
        return rows if token_ids_V is None else token_ids_V[rows]

    states_ND, gold_N = one.state_BLD[one.counts_BL], gold_BL[one.counts_BL]
    hits = [
        choose(states) == gold
        for states, gold in zip(
            states_ND.split(ROWS_AT_ONCE), gold_N.split(ROWS_AT_ONCE), strict=True
        )
    ]
    hits_BL = torch.zeros_like(one.counts_BL)
    hits_BL[one.counts_BL] = torch.cat(hits)
    return hits_BL


def answer_spans(answer: Sequence[bool]) -> list[tuple[int, int]]:
    """Return the spans of answer tokens [start, end): one per assistant turn."""
    edges = [a != b for a, b in zip([False, *answer], [*answer, False], strict=True)]
    places = [index for index, edge in enumerate(edges) if edge]
    return list(zip(places[::2], places[1::2], strict=True))


def replay(hits: Sequence[Sequence[bool]], start: int, end: int) -> list[int]:
    """Return the accepted draft tokens of every step of the answer [start, end).

    Draft tokens beyond the end of the answer do not count: the engine discards them.

    Args:
        hits: for every pass and row, whether the draft token is the answer's.
    """
    accepted: list[int] = []
    # The last token that is known when a step begins; the first comes out of the prefill.
    known = start
    while known < end - 1:
        deepest = min(len(hits), end - 1 - known)
        first_row = known - 1
        count = 0
        while count < deepest and first_row >= 0 and hits[count][first_row + count]:
            count += 1
        accepted.append(count)
        known += count + 1
    return accepted


def validate(
    draft: Draft,
    teacher: Teacher,
    samples: Sequence[int],
    families: Sequence[str],
    num_draft_tokens: int,
    batch_size: int,
    group: Processes,
) -> tuple[Families, GateDecisions]:
    """Return acceptance on held-out samples, by family and overall, and the gate's decisions.

    The processes share the samples and all return the same. The gate draws nothing.

    Args:
        samples: held-out samples of the corpus, by index.
        families: the families among them.
        num_draft_tokens: K of the simulated chains.
    """
    spec = draft.config.compressor_spec
    decisions = torch.zeros(2 * len(spec.primitives) if spec.gated else 0, dtype=torch.float64)
    mine = sorted(samples, key=lambda index: teacher.lengths[index])[group.rank :: group.world]
    found: Families = {}
    for first in range(0, len(mine), batch_size):
        batch = pad_batch(teacher.observe(mine[first : first + batch_size]))
        part = simulate(draft, teacher.facts.lm_head_VD, batch, num_draft_tokens)
        found = merge_families(found, part)
        decisions += _gate_decisions(draft, batch) if spec.gated else 0
    names = [*sorted({*families} - {""}), OVERALL]
    nothing = Acceptance.nothing(num_draft_tokens)
    rows = [
        [one.steps, one.tokens, one.answers, *one.accepted_by_position]
        for one in (found.get(name, nothing) for name in names)
    ]
    totals = group.sum(torch.tensor(rows, dtype=torch.int64)).tolist()
    merged = {
        name: Acceptance(steps, tokens, tuple(accepted), answers)
        for name, (steps, tokens, answers, *accepted) in zip(names, totals, strict=True)
    }
    return merged, GateDecisions.from_sums(group.sum(decisions).tolist())


@torch.inference_mode()
def _gate_decisions(draft: Draft, batch: DraftBatch) -> Tensor:
    batch = batch.to(draft.weight.device)
    decision = decide(draft.compressor, batch.hidden_BLD, batch.answer_BL, batch.runs)
    assert decision is not None  # the head has a gate
    return sum_decisions(decision.of_images()).double().cpu()
