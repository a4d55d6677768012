"""Acceptance: simulated chains against a draft that really drafts, and how answers add up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.heads import random_draft_vlm
from tests.train.samples import HEADS, random_draft, random_sample
from vllm_vispec.evaluate import engine
from vllm_vispec.evaluate.engine import Question, inside_answer, measure
from vllm_vispec.evaluate.options import EvalOptions
from vllm_vispec.reference import Draft, DraftVlm
from vllm_vispec.train.acceptance import (
    Acceptance,
    answer_spans,
    by_family,
    draft_hits,
    replay,
    simulate,
)
from vllm_vispec.train.target import Observed, pad_batch

DEPTH = 4
FEW = 3
TABLE = torch.randn(64, 32, generator=torch.Generator().manual_seed(5))


def lm_head(favoured: int = FEW) -> Tensor:
    """An lm_head under which only a few tokens are ever the best: chains are often right."""
    head_VD = torch.zeros(64, 32)
    head_VD[:favoured] = torch.randn(favoured, 32, generator=torch.Generator().manual_seed(6))
    return head_VD


def sample(length: int, answers: list[tuple[int, int]], family: str = "") -> Observed:
    """A sample of few different tokens whose text embeddings are the table's rows."""
    one = random_sample(length, ((2, 7), (9, 12)), answers)
    token_ids = one.token_ids % FEW
    embeds = torch.where(one.answer[:, None], TABLE[token_ids], one.embeds_LD)
    return replace(one, token_ids=token_ids, embeds_LD=embeds, family=family)


def chains_of(name: str) -> Draft:
    """A head; as a draft VLM one under whose own lm_head only a few tokens are ever the best."""
    if name != "draft_vlm":
        return random_draft(replace(HEADS[name], has_embed_tokens=False))
    draft = random_draft_vlm()
    assert draft.lm_head is not None
    with torch.no_grad():
        draft.lm_head.weight[FEW:] = 0
    return draft


def drafted(draft: Draft, one: Observed, start: int, known: int) -> list[int]:
    """The chain behind `known` tokens of an answer that begins at `start`, from scratch."""
    embeds_LD, runs = one.embeds_LD[:known], [run for run in one.runs if run[1] <= known]
    if isinstance(draft, DraftVlm):
        ids = one.token_ids
        prefill = draft.prefill(ids[:known], embeds_LD, int(ids[known]), runs)
        found: list[int] = draft.chain(prefill, DEPTH).token_ids_S.tolist()
        return found
    after_D, hidden_LD = one.embeds_LD[known], one.hidden_LD[:known]
    rows = draft.prefill(embeds_LD, after_D, hidden_LD, runs, start)
    return draft.chain(rows, DEPTH, lm_head(), TABLE).token_ids_S.tolist()


def drafted_steps(draft: Draft, one: Observed, start: int, end: int) -> list[int]:
    """Accepted tokens of every step of an answer, chains drafted greedily from scratch."""
    steps, known = [], start
    while known < end - 1:
        gold = one.token_ids[known + 1 : end].tolist()
        pairs = zip(drafted(draft, one, start, known), gold, strict=False)
        count = next((i for i, (a, b) in enumerate(pairs) if a != b), min(DEPTH, len(gold)))
        steps.append(count)
        known += count + 1
    return steps


@pytest.mark.parametrize(
    "name", ["grouped", "no_compress", "eagle", "concat", "weighted", "select_global", "draft_vlm"]
)
@torch.no_grad()
def test_simulation_equals_drafting_every_chain(name: str) -> None:
    draft = chains_of(name)
    samples = [
        sample(60, [(14, 58)], family="one turn"),
        sample(40, [(13, 20), (24, 40)], family="two turns"),
        sample(31, [(13, 14), (20, 31)], family="two turns"),
    ]
    found = simulate(draft, lm_head(), pad_batch(samples), DEPTH)
    spans = [(one, *span) for one in samples for span in answer_spans(one.answer.tolist())]
    assert found == [
        (
            one.family,
            Acceptance.of_answer(drafted_steps(draft, one, start, end), end - start, DEPTH),
        )
        for one, start, end in spans
    ]
    families = by_family(found, DEPTH)
    assert list(families) == ["one turn", "two turns", "overall"]
    assert families["overall"].answers == 5
    assert sum(families["overall"].accepted_by_position) > 10
    assert families["overall"].tokens == 43 + 6 + 15 + 0 + 10
    alone = [one for x in samples for one in simulate(draft, lm_head(), pad_batch([x]), DEPTH)]
    assert alone == found


def test_bfloat16_is_simulated_as_such() -> None:
    draft = random_draft(HEADS["reference"]).bfloat16()
    ((_, one),) = simulate(draft, lm_head().bfloat16(), pad_batch([sample(60, [(14, 58)])]), DEPTH)
    assert one.tokens == 43


def test_a_vocabulary_of_its_own_drafts_only_that() -> None:
    draft, head = random_draft(HEADS["reference"]), lm_head()
    batch = pad_batch([sample(60, [(14, 58)]), sample(33, [(13, 33)])])
    everything, some = torch.arange(64), torch.tensor([0, 2])
    whole_SBL = draft_hits(draft, head, batch, DEPTH)
    assert torch.equal(draft_hits(draft, head[everything], batch, DEPTH, everything), whole_SBL)
    listed_BL = torch.isin(torch.nn.functional.pad(batch.ids_BL[:, 2:], (0, 2)), some)
    found_SBL = draft_hits(draft, head[some], batch, DEPTH, some)
    assert not (found_SBL & ~listed_BL).any()
    # What was right stays right, as far as it is in the list.
    assert (found_SBL >= (whole_SBL & listed_BL)).all()
    assert (whole_SBL & ~listed_BL).any()


@pytest.mark.parametrize(
    ("right", "end", "accepted"),
    # Token 4 comes out of the prefill; 3 + 1 tokens a step, then the last 2 are both drafts.
    [(True, 11, [3, 2]), (True, 5, []), (True, 6, [1]), (False, 9, [0, 0, 0, 0])],
)
def test_an_answer_is_replayed_to_its_end(right: bool, end: int, accepted: list[int]) -> None:
    assert replay([[right] * 20] * 3, 4, end) == accepted


def test_spans_of_answers() -> None:
    assert answer_spans([False, True, True, False, True]) == [(1, 3), (4, 5)]
    assert answer_spans([True]) == [(0, 1)]
    assert answer_spans([False, False]) == []


def test_rates_of_an_acceptance() -> None:
    one = Acceptance.of_answer([2, 0, 1, 2], num_tokens=10, num_draft_tokens=3)
    assert one == Acceptance(4, 9, 1, (3, 2, 0))
    assert (one.mean_accepted_tokens, one.acceptance_length) == (1.25, 2.25)
    assert one.acceptance_rates == (0.75, 0.5, 0.0)
    found = by_family([("charts", one), ("", one)], 3)
    assert found == {"charts": one, "overall": Acceptance(8, 18, 2, (6, 4, 0))}
    assert by_family([], 2)["overall"].acceptance_length == 1


def test_drafts_behind_the_end_of_an_answer_are_left_out() -> None:
    # 8 tokens: 1 of the prefill, 3 + 1 of the first step, 3 of the second, whose 5 were accepted.
    assert inside_answer([3, 5], 8) == [3, 3]
    assert inside_answer([3, 2], 8) == [3, 2]


def test_answers_of_an_engine_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = SimpleNamespace(per_step_accepted=(3, 5))
    answers = [
        SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, spec_decode_metrics=metrics)])
        for ids in (tuple(range(8)), (9, *range(7)))
    ]

    @contextmanager
    def opened(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(generate=lambda prompts, params: answers)

    monkeypatch.setattr(engine, "_open_engine", opened)
    options = EvalOptions(target="t", head="h", data=Path(__file__), num_speculative_tokens=5)
    asked = [Question(family, [1], (), list(range(8))) for family in ("charts", "")]
    found = measure(options, asked, 100)
    assert (found.identical, found.accepted_past_end) == (1, 2 * 2)
    assert found.families["charts"] == Acceptance(2, 7, 1, (2, 2, 2, 0, 0))
    assert found.families["overall"] == Acceptance(4, 14, 2, (4, 4, 4, 0, 0))
