"""Simulated acceptance: against a draft that really drafts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.heads import random_draft_vlm
from tests.train.samples import HEADS, random_draft, random_sample
from vllm_vispec.evaluate.engine import Answer, Question, inside_answer, summarise
from vllm_vispec.reference import Draft, DraftVlm
from vllm_vispec.train.batch import Observed, pad_batch
from vllm_vispec.train.metrics import Acceptance, merge_families
from vllm_vispec.train.simulate import answer_spans, draft_hits, replay, simulate
from vllm_vispec.utils.errors import ViSpecError

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
    expected: dict[str, Acceptance] = {}
    for one in samples:
        for start, end in answer_spans(one.answer.tolist()):
            steps = drafted_steps(draft, one, start, end)
            part = {one.family: Acceptance.of_answer(steps, end - start, DEPTH)}
            expected = merge_families(expected, part)
    overall = found.pop("overall")
    assert found == expected
    assert overall == expected["one turn"].merge(expected["two turns"])
    assert overall.answers == 5
    assert sum(overall.accepted_by_position) > 10
    assert overall.tokens == 43 + 6 + 15 + 0 + 10


def test_batching_does_not_change_the_simulation() -> None:
    draft = random_draft(HEADS["reference"])
    samples = [sample(60, [(14, 58)]), sample(33, [(13, 33)])]
    alone = merge_families(*(simulate(draft, lm_head(), pad_batch([s]), DEPTH) for s in samples))
    assert simulate(draft, lm_head(), pad_batch(samples), DEPTH) == alone


def test_bfloat16_is_simulated_as_such() -> None:
    draft = random_draft(HEADS["reference"]).bfloat16()
    found = simulate(draft, lm_head().bfloat16(), pad_batch([sample(60, [(14, 58)])]), DEPTH)
    assert found["overall"].tokens == 43


def test_a_vocabulary_of_its_own_drafts_only_that() -> None:
    draft, head = random_draft(HEADS["reference"]), lm_head()
    batch = pad_batch([sample(60, [(14, 58)]), sample(33, [(13, 33)])])
    everything = torch.arange(64)
    same = simulate(draft, head[everything], batch, DEPTH, everything)
    assert same == simulate(draft, head, batch, DEPTH)
    some = torch.tensor([0, 2])
    gold_BL = torch.nn.functional.pad(batch.ids_BL[:, 2:], (0, 2))
    listed_BL = torch.isin(gold_BL, some)
    whole_SBL = draft_hits(draft, head, batch, DEPTH)
    found_SBL = draft_hits(draft, head[some], batch, DEPTH, some)
    assert not (found_SBL & ~listed_BL).any()
    # What was right stays right, as far as it is in the list.
    assert (found_SBL >= (whole_SBL & listed_BL)).all()
    assert (whole_SBL & ~listed_BL).any()


def test_an_always_right_draft_is_cut_at_the_end_of_the_answer() -> None:
    right = [[True] * 20] * 3
    # Token 4 comes out of the prefill; 3 + 1 tokens a round, then the last 2 are both drafts.
    assert replay(right, 4, 11) == [3, 2]
    assert replay(right, 4, 5) == []
    assert replay(right, 4, 6) == [1]


def test_an_always_wrong_draft_takes_one_round_a_token() -> None:
    assert replay([[False] * 20] * 3, 4, 9) == [0, 0, 0, 0]


def test_spans_of_answers() -> None:
    assert answer_spans([False, True, True, False, True]) == [(1, 3), (4, 5)]
    assert answer_spans([True]) == [(0, 1)]
    assert answer_spans([False, False]) == []


def test_rates_of_an_acceptance() -> None:
    one = Acceptance.of_answer([2, 0, 1, 2], num_tokens=10, num_draft_tokens=3)
    assert one == Acceptance(4, 9, (3, 2, 0), 1)
    assert one.mean_accepted_tokens == 1.25
    assert one.acceptance_length == 2.25
    assert one.acceptance_rates == (0.75, 0.5, 0.0)
    assert one.merge(one) == Acceptance(8, 18, (6, 4, 0), 2)
    assert Acceptance.nothing(2).acceptance_length == 1


def test_drafts_behind_the_end_of_an_answer_are_left_out() -> None:
    # 8 tokens: 1 of the prefill, 3 + 1 of the first round, 3 of the second, whose 5 were accepted.
    assert inside_answer([3, 5], 8) == [3, 3]
    assert inside_answer([3, 2], 8) == [3, 2]
    question = Question("charts", [1], (), list(range(8)))
    result = summarise([question], [Answer(tuple(range(8)), (3, 5))], 5)
    assert result.accepted_past_end == 2
    assert result.identical == 1
    assert result.families["charts"] == result.families["overall"]
    assert sum(result.families["charts"].accepted_by_position) == 6


def test_drafting_nothing_is_refused() -> None:
    with pytest.raises(ViSpecError, match="at least 1"):
        simulate(random_draft(HEADS["reference"]), lm_head(), pad_batch([random_sample(9)]), 0)
