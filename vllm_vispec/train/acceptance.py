"""Acceptance of greedy chains, and what a gate decided: what validation and evaluation measure.

Without an engine, chains are replayed over recorded answers. Pass s of an exact rollout computes,
at row p, the (s + 1)-th draft token of the chain that begins at row p - s, given that the chain was
right so far. A step accepts the leading right tokens, then the target adds its bonus token, and the
next step begins behind it. On the target's own greedy answers this is what the engine does under
greedy decoding, up to rounding.

Tensor names end in their shape: B samples, L rows, N counted rows, S passes, D hidden, V
vocabulary, K branches of a gate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from rich.text import Text
from torch import Tensor

from vllm_vispec.compressors.spec import CompressorSpec
from vllm_vispec.reference import Decision, Draft, decide
from vllm_vispec.train.distributed import Processes
from vllm_vispec.train.memory import VALIDATION, explained
from vllm_vispec.train.rollout import PassOutput, rollout
from vllm_vispec.train.target import DraftBatch, pad_batch
from vllm_vispec.train.teacher import Teacher

# Rows whose logits are held at once; a vocabulary of 150,000 then takes 300 MB in float32.
ROWS_AT_ONCE = 512
OVERALL = "overall"
# Tokens of drafts that are shown.
ACCEPTED, REJECTED = "green", "red"
_LONGEST = 80


@dataclass(frozen=True)
class Acceptance:
    """Sums over the steps (draft and verify) of some answers.

    Attributes:
        steps: verification steps.
        tokens: answer tokens that steps produced. The first token of an answer comes out of the
            prefill and does not count. A step whose drafts reach the end of the answer has no
            bonus token, so this may be less than accepted + steps.
        answers: answers (one per assistant turn).
        accepted_by_position: steps that accepted the draft token at each position (K of them).
    """

    steps: int
    tokens: int
    answers: int
    accepted_by_position: tuple[int, ...]

    @classmethod
    def of_answer(
        cls, accepted: Sequence[int], num_tokens: int, num_draft_tokens: int
    ) -> Acceptance:
        """Count one answer.

        Args:
            accepted: accepted draft tokens of every step, in order.
            num_tokens: tokens of the answer, its first and its last included.
            num_draft_tokens: K.
        """
        positions = range(num_draft_tokens)
        by_position = (sum(count > position for count in accepted) for position in positions)
        return cls(len(accepted), max(num_tokens - 1, 0), 1, tuple(by_position))

    @property
    def mean_accepted_tokens(self) -> float:
        """Accepted draft tokens per step, 0 without steps."""
        return sum(self.accepted_by_position) / max(self.steps, 1)

    @property
    def acceptance_length(self) -> float:
        """Accepted draft tokens per step plus the bonus token, as vLLM counts; 1 without steps."""
        return self.mean_accepted_tokens + 1

    @property
    def acceptance_rates(self) -> tuple[float, ...]:
        """Share of steps that accepted the draft token at each position."""
        return tuple(count / max(self.steps, 1) for count in self.accepted_by_position)

    def to_json(self) -> dict[str, Any]:
        """Sums and rates as plain data."""
        return {
            "answers": self.answers,
            "steps": self.steps,
            "tokens": self.tokens,
            "acceptance_length": round(self.acceptance_length, 4),
            "mean_accepted_tokens": round(self.mean_accepted_tokens, 4),
            "acceptance_rate_per_position": [round(rate, 4) for rate in self.acceptance_rates],
            "accepted_by_position": list(self.accepted_by_position),
        }


Answers = Sequence[tuple[str, Acceptance]]
"""Some answers: the family of each ("" if unknown), and its acceptance."""
Families = dict[str, Acceptance]
"""Acceptance by family, then `OVERALL`."""


def by_family(answers: Answers, num_draft_tokens: int, names: Iterable[str] = ()) -> Families:
    """Sum answers up by family and overall.

    Args:
        num_draft_tokens: K.
        names: families to list even without an answer.
    """
    families = sorted({*names, *(family for family, _ in answers)} - {""})
    found = {name: [one for family, one in answers if family == name] for name in families}
    found[OVERALL] = [one for _, one in answers]
    return {name: _total(parts, num_draft_tokens) for name, parts in found.items()}


def _total(parts: Sequence[Acceptance], num_draft_tokens: int) -> Acceptance:
    return Acceptance(
        sum(one.steps for one in parts),
        sum(one.tokens for one in parts),
        sum(one.answers for one in parts),
        tuple(sum(one.accepted_by_position[k] for one in parts) for k in range(num_draft_tokens)),
    )


@torch.inference_mode()
def simulate(
    draft: Draft,
    lm_head_VD: Tensor,
    batch: DraftBatch,
    num_draft_tokens: int,
    token_ids_V: Tensor | None = None,
) -> Answers:
    """Return the acceptance of greedy chains of `num_draft_tokens` for every answer of a batch.

    Every assistant turn is a generation of its own whose prompt is everything before it. Computes
    in the dtype of the draft; logits in the dtype of the lm_head that reads it.

    Args:
        lm_head_VD: the target's lm_head, or some of its rows.
        batch: samples whose answers are the target's own greedy ones.
        token_ids_V: the tokens of these rows; None: all of the target's.
    """
    moved = batch.to(draft.weight.device, draft.weight.dtype)
    hits_SBL = draft_hits(draft, lm_head_VD, moved, num_draft_tokens, token_ids_V)
    return [
        (family, Acceptance.of_answer(replay(hits_SL, start, end), end - start, num_draft_tokens))
        for family, hits_SL, answer_L in zip(
            batch.families, hits_SBL.transpose(0, 1).tolist(), batch.answer_BL.tolist(), strict=True
        )
        for start, end in answer_spans(answer_L)
    ]


def draft_hits(
    draft: Draft,
    lm_head_VD: Tensor,
    batch: DraftBatch,
    num_draft_tokens: int,
    token_ids_V: Tensor | None = None,
) -> Tensor:
    """Return where pass s at row p drafts answer token p + 2: bool [S, B, L], on the CPU."""
    drafted_SBL = draft_tokens(draft, lm_head_VD, batch, num_draft_tokens, token_ids_V)
    return is_hit(drafted_SBL, batch.ids_BL)


def is_hit(drafted_SBL: Tensor, ids_BL: Tensor) -> Tensor:
    """Return which `draft_tokens` are the answers' own."""
    return drafted_SBL == F.pad(ids_BL.cpu()[:, 2:], (0, 2))


def draft_tokens(
    draft: Draft,
    lm_head_VD: Tensor,
    batch: DraftBatch,
    num_draft_tokens: int,
    token_ids_V: Tensor | None = None,
) -> Tensor:
    """Return what pass s at row p drafts as answer token p + 2: int64 [S, B, L], on the CPU.

    -1 where row p of that pass drafts no answer token.
    """
    passes = rollout(draft, batch, draft.distinct_passes(num_draft_tokens))
    head_VD = draft.output_head(lm_head_VD, token_ids_V)
    drafted = [_tokens_of_pass(one, head_VD, token_ids_V) for one in passes]
    drafted += drafted[-1:] * (num_draft_tokens - len(drafted))
    return torch.stack(drafted).cpu()


def _tokens_of_pass(one: PassOutput, lm_head_VD: Tensor, token_ids_V: Tensor | None) -> Tensor:
    states_ND = one.state_BLD[one.counts_BL].to(lm_head_VD)
    best = [F.linear(part, lm_head_VD).argmax(-1) for part in states_ND.split(ROWS_AT_ONCE)]
    best_N = torch.cat(best)
    drafted_BL = torch.full_like(one.counts_BL, -1, dtype=torch.int64)
    drafted_BL[one.counts_BL] = best_N if token_ids_V is None else token_ids_V[best_N]
    return drafted_BL


def answer_spans(answer: Sequence[bool]) -> list[tuple[int, int]]:
    """Return the spans of answer tokens [start, end): one per assistant turn."""
    padded = [False, *answer, False]
    edges = [place for place, (a, b) in enumerate(pairwise(padded)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


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
    teacher: Teacher[Any],
    held_out: Mapping[int, str],
    num_draft_tokens: int,
    batch_size: int,
    group: Processes,
) -> tuple[Families, Tensor]:
    """Return acceptance on held-out samples, and the gate's decisions (see `sum_decisions`).

    The processes share the samples and all return the same. The gate draws nothing.

    Args:
        held_out: index in the corpus -> family.
        num_draft_tokens: K of the simulated chains.
    """
    spec, lengths = draft.config.compressor_spec, teacher.lengths
    decisions_2K = torch.zeros(2, len(spec.primitives) if spec.gated else 0, dtype=torch.float64)
    mine = sorted(held_out, key=lengths.__getitem__)[group.rank :: group.world]
    answers: list[tuple[str, Acceptance]] = []
    batches = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    for ready in teacher.ready(batches):
        observed = teacher.observe(ready)
        with explained(VALIDATION, {one.sample_id: len(one.token_ids) for one in observed}):
            batch = pad_batch(observed)
            answers += simulate(draft, teacher.facts.lm_head_VD, batch, num_draft_tokens)
            decisions_2K += _decisions_of(draft, batch)
    found = by_family(answers, num_draft_tokens, held_out.values())
    sums = torch.tensor(
        [[x.steps, x.tokens, x.answers, *x.accepted_by_position] for x in found.values()]
    )
    families = {
        name: Acceptance(steps, tokens, answered, tuple(accepted))
        for name, (steps, tokens, answered, *accepted) in zip(
            found, group.sum(sums).tolist(), strict=True
        )
    }
    return families, group.sum(decisions_2K).cpu()


@torch.inference_mode()
def _decisions_of(draft: Draft, batch: DraftBatch) -> Tensor:
    batch = batch.to(draft.weight.device)
    decision = decide(draft.compressor, batch.hidden_BLD, batch.answer_BL, batch.runs)
    return sum_decisions(decision).cpu()


def sum_decisions(decision: Decision | None) -> Tensor:
    """Return how often a gate chose each branch: sums over turns that see an image, [2, K].

    First how often a branch was the first choice (in training with its noise), then its share in
    the gate's softmax without noise. [2, 0] for a head without a gate.
    """
    if decision is None:
        return torch.zeros(2, 0)
    output = decision.of_images()
    chosen_K = F.one_hot(output.choice_G, output.share_GK.shape[-1]).sum(0)
    return torch.stack((chosen_K.to(output.share_GK), output.share_GK.detach().sum(0)))


def describe_gate(decisions_2K: Tensor, spec: CompressorSpec) -> dict[str, Any]:
    """Return how many turns a gate decided, and shares by branch; nothing without any turn."""
    turns = int(decisions_2K[0].sum())
    if not turns:
        return {}
    shares: list[dict[str, float]] = []
    for sums in decisions_2K.tolist():
        # Branches that are written alike add up.
        found: dict[str, float] = {}
        for branch, value in zip(map(str, spec.primitives), sums, strict=True):
            found[branch] = found.get(branch, 0.0) + value / turns
        shares.append({name: round(share, 4) for name, share in found.items()})
    return {"turns": turns, "chosen": shares[0], "share": shares[1]}


@torch.inference_mode()
def show_drafts(
    draft: Draft,
    teacher: Teacher[Any],
    indices: Sequence[int],
    num_draft_tokens: int,
    tokenizer: Any,
) -> Iterator[Text]:
    """Yield the beginning of each sample's first answer as greedy chains make it.

    Accepted draft tokens are green. A rejected one is red and in brackets, before the token that
    the target put in its place.

    Args:
        num_draft_tokens: K of the chains.
        tokenizer: the target's.
    """
    lm_head_VD = teacher.facts.lm_head_VD
    for ready in teacher.ready([index] for index in indices):
        (observed,) = teacher.observe(ready)
        batch = pad_batch([observed]).to(draft.weight.device, draft.weight.dtype)
        drafted_SBL = draft_tokens(draft, lm_head_VD, batch, num_draft_tokens)
        hits_SBL = is_hit(drafted_SBL, batch.ids_BL)
        spans = answer_spans(observed.answer.tolist())
        if spans:
            start, end = spans[0]
            end = min(end, start + _LONGEST)
            text = Text(f"{observed.sample_id}: ", style="bold")
            chains = (drafted_SBL[:, 0].tolist(), hits_SBL[:, 0].tolist())
            yield text.append_text(
                _answer(observed.token_ids.tolist(), start, end, *chains, tokenizer)
            )


def _answer(
    ids: Sequence[int],
    start: int,
    end: int,
    drafted_SL: Sequence[Sequence[int]],
    hits_SL: Sequence[Sequence[bool]],
    tokenizer: Any,
) -> Text:
    def decoded(*more: int) -> str:
        """What tokens add to those that are known; pieces alone would lose their spaces."""
        before = tokenizer.decode(ids[start : known + 1])
        return str(tokenizer.decode([*ids[start : known + 1], *more]).removeprefix(before))

    text = Text(tokenizer.decode(ids[start : start + 1]), style="not bold")
    known = start
    for accepted in replay(hits_SL, start, end):
        text.append(decoded(*ids[known + 1 : known + 1 + accepted]), ACCEPTED)
        # Pass s at row p drafts token p + 2.
        row, known = known - 1 + accepted, known + accepted
        if known + 1 >= end:
            break
        if accepted < len(drafted_SL) and drafted_SL[accepted][row] >= 0:
            text.append(f"[{decoded(drafted_SL[accepted][row])}]", REJECTED)
        text.append(decoded(ids[known + 1]))
        known += 1
    return text
