"""Compact rows of heads with a compressor: where tokens stand, what fills them, who sees them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.train.samples import COMPRESSORS, random_draft
from vllm_vispec.compressors.spec import parse_compressor
from vllm_vispec.reference import (
    RowPlan,
    ViSpecDraft,
    attention_mask,
    decide,
    masked_rows,
    plan_rows,
)

Run = tuple[int, int]
EACH_COMPRESSOR = pytest.mark.parametrize("name", COMPRESSORS)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# Apart, touching, at the start, at the end, one token, one token at the start, only an image.
PROMPTS: list[tuple[int, list[Run]]] = [
    (20, [(3, 9), (12, 18)]),
    (20, [(2, 7), (7, 11)]),
    (20, [(0, 6), (9, 10)]),
    (20, [(12, 20)]),
    (20, [(0, 1), (1, 5)]),
    (20, [(0, 20)]),
    (20, []),
]


def planned(text: str, length: int, runs: list[Run]) -> RowPlan:
    return plan_rows(length, runs, 1, compressor=parse_compressor(text))


def image_rows(plan: RowPlan) -> list[tuple[int, int, int]]:
    """(position, image, token) of each image row."""
    columns = zip(plan.positions, plan.image_of_row, plan.token_of_row, strict=True)
    return [row for row in columns if row[2] >= 0]


def prefilled(draft: ViSpecDraft, length: int, runs: list[Run], seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    embeds, hidden = torch.randn(2, length + 1, 32, generator=generator).unbind()
    state = draft.prefill(embeds[:length], embeds[length], hidden[:length], runs)
    return embeds, hidden, state


def test_a_ratio_keeps_the_middles_at_their_own_positions() -> None:
    plan = planned("prune:3", 12, [(2, 8)])
    # Six embeddings, rows 1 to 6: stretches of three, the middle ones stay.
    assert image_rows(plan) == [(2, 0, 0), (5, 0, 1)]
    assert plan.positions == (0, 2, 5, 7, 8, 9, 10, 11)
    assert plan.run_of_row == (-1, 0, 0, 0, 0, 0, 0, 0)


def test_an_image_at_the_start_loses_its_first_embedding() -> None:
    plan = planned("prune:1", 6, [(0, 3)])
    assert plan.images == ((1, 3),)
    assert image_rows(plan) == [(0, 0, 0), (1, 0, 1)]
    assert planned("prune:1", 6, [(0, 1)]).images == ()


def test_touching_images_are_one_run_and_two_images() -> None:
    plan = planned("prune:2", 12, [(2, 6), (6, 8)])
    assert plan.runs == ((2, 8),)
    assert plan.images == ((2, 6), (6, 8))
    assert image_rows(plan) == [(1, 0, 0), (3, 0, 1), (5, 1, 0)]
    assert plan.filler_of_row([2, 1])[1:4] == [0, 1, 2]


@EACH_COMPRESSOR
@pytest.mark.parametrize(("length", "runs"), PROMPTS)
@torch.no_grad()
def test_masked_rows_equal_compact_rows(name: str, length: int, runs: list[Run]) -> None:
    draft = random_draft(COMPRESSORS[name])
    embeds, hidden, state = prefilled(draft, length, runs)
    rows = masked_rows(draft, embeds[None], hidden[None], [runs])
    answer = torch.arange(length + 1)[None] >= length
    decision = decide(draft.compressor, hidden[None], answer, [runs])
    bias = None if decision is None else decision.key_bias(rows.branch_BL)
    positions = torch.arange(length + 1)[None]
    out, _ = draft.run_layer(rows.layer_in_BLD, positions, attention_mask(rows.visible_BL, bias))
    kept = list(state.plan.positions)
    assert rows.visible_BL[0].nonzero()[:, 0].tolist() == kept
    torch.testing.assert_close(rows.layer_in_BLD[0, kept], state.layer_in_ND, **CLOSE)
    torch.testing.assert_close(out[0, kept], state.out_ND, **CLOSE)
    torch.testing.assert_close(rows.global_BLD[0, length - 1], state.global_D, **CLOSE)


@EACH_COMPRESSOR
@torch.no_grad()
def test_an_images_tokens_go_through_the_embedding_half_of_fc(name: str) -> None:
    draft = random_draft(COMPRESSORS[name])
    assert draft.compressor is not None
    embeds, _, state = prefilled(draft, 20, [(2, 7), (7, 11)])
    images = [embeds[2:7], embeds[7:11]]
    tokens = draft.image_tokens(images)
    for image, found in zip(images, tokens, strict=True):
        (alone,) = draft.compressor([image])
        torch.testing.assert_close(found, F.linear(alone, draft.fc.weight[:, :32]), **CLOSE)
    filled = state.plan.filler_of_row([len(one) for one in tokens])
    for row, token in enumerate(filled):
        if token >= 0:
            torch.testing.assert_close(state.layer_in_ND[row], torch.cat(tokens)[token], **CLOSE)
    assert draft.image_tokens([]) == []


@torch.no_grad()
def test_only_the_chosen_branch_is_seen() -> None:
    """What a hidden branch's tokens hold changes nothing behind the gate."""
    draft = random_draft(COMPRESSORS["select_global"])
    assert draft.compressor is not None
    _, hidden, state = prefilled(draft, 20, [(2, 14)])
    choice = int(draft.compressor.decide(hidden[19:20]).choice_G)
    rows = [r for r, branch in enumerate(state.plan.branch_of_row) if branch not in (-1, choice)]
    assert rows
    assert bool((state.key_bias_N[rows] < -100).all())
    moved = state.layer_in_ND.clone()
    moved[rows] += 5.0
    positions = torch.tensor(state.plan.positions)[None]
    mask = torch.ones(len(moved), len(moved)).tril().log() + state.key_bias_N
    out, _ = draft.run_layer(moved[None], positions, mask[None])
    torch.testing.assert_close(out[0, -1], state.out_ND[-1], **CLOSE)


@torch.no_grad()
def test_a_weighted_branch_counts_as_the_gate_says() -> None:
    draft = random_draft(COMPRESSORS["weighted"])
    assert draft.compressor is not None
    _, hidden, state = prefilled(draft, 20, [(2, 14)])
    share = draft.compressor.decide(hidden[19:20]).share_GK[0]
    for branch, bias in zip(state.plan.branch_of_row, state.key_bias_N.tolist(), strict=True):
        expected = 0.0 if branch < 0 else float(share[branch].log())
        assert bias == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def test_keys_of_a_prompt_do_not_depend_on_the_question() -> None:
    draft = random_draft(COMPRESSORS["select"])
    embeds, hidden, state = prefilled(draft, 20, [(2, 14)])
    other = hidden.clone()
    other[19] += 3.0
    again = draft.prefill(embeds[:20], embeds[20], other[:20], [(2, 14)])
    for one, two in zip(state.cache, again.cache, strict=True):
        assert torch.equal(one[:, :, :-1], two[:, :, :-1])


@EACH_COMPRESSOR
@torch.no_grad()
def test_steps_one_by_one_equal_rows_at_once(name: str) -> None:
    draft = random_draft(COMPRESSORS[name])
    _, _, state = prefilled(draft, 16, [(2, 12)])
    more = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(9))
    at_once, _, _ = draft.extend(
        more[0], more[1], state.global_D, 16, state.cache, state.key_bias_N
    )
    cache = state.cache
    for index in range(3):
        out, _, cache = draft.step(
            more[0, index],
            more[1, index],
            state.global_D,
            16 + index,
            cache,
            state.key_bias_N,
        )
        torch.testing.assert_close(out, at_once[index], **CLOSE)
