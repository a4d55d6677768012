"""What drafts look like: held-out answers with their accepted and their rejected draft tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.text import Text

from vllm_vispec.reference import Draft
from vllm_vispec.train.acceptance import answer_spans, draft_tokens, is_hit, replay
from vllm_vispec.train.target import pad_batch
from vllm_vispec.train.teacher import Teacher

ACCEPTED, REJECTED = "green", "red"
_LONGEST = 80


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
