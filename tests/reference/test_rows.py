"""Geometry of compression, and masking as its equal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.heads import BASE
from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.reference import ViSpecDraft, attention_mask, masked_rows, merge_runs, plan_rows
from vllm_vispec.utils.errors import ViSpecError

Run = tuple[int, int]


TEXT = [(0, -1, -1), (1, -1, -1), (2, -1, -1)]
# Prompt length, images, queries -> (position, run, adaptor row) of each compact row.
GEOMETRY: dict[str, tuple[int, list[Run], int, list[tuple[int, int, int]]]] = {
    "text only": (3, [], 2, TEXT),
    "rows a-1 to b-2 shrink to the last num_q - 1 of them": (
        *(9, [(3, 7)], 3),
        [*TEXT[:2], (4, 0, 0), (5, 0, 1), (6, 0, -1), (7, 0, -1), (8, 0, -1)],
    ),
    "one query keeps no row": (5, [(1, 4)], 1, [(3, 0, -1), (4, 0, -1)]),
    "images that touch are one": (
        *(8, [(2, 4), (4, 6)], 2),
        [TEXT[0], (4, 0, 0), (5, 0, -1), (6, 0, -1), (7, 0, -1)],
    ),
    # The last row pairs the last image token's hidden state with the sampled token.
    "an image at the end": (5, [(2, 5)], 2, [TEXT[0], (3, 0, 0), (4, 0, -1)]),
    "an image at the start": (
        *(5, [(0, 3)], 3),
        [(0, 0, 0), (1, 0, 1), (2, 0, -1), (3, 0, -1), (4, 0, -1)],
    ),
    "an image of one token at the start has no row": (2, [(0, 1)], 2, TEXT[:2]),
    "a short image keeps the last adaptor rows": (
        *(6, [(2, 4)], 5),
        [TEXT[0], (1, 0, 2), (2, 0, 3), (3, 0, -1), (4, 0, -1), (5, 0, -1)],
    ),
}


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(name: str) -> None:
    length, runs, num_q, wanted = GEOMETRY[name]
    plan = plan_rows(length, runs, num_q)
    found = zip(plan.positions, plan.run_of_row, plan.token_of_row, strict=True)
    assert list(found) == wanted


def test_runs() -> None:
    assert merge_runs([(6, 8), (2, 4), (4, 6)], 9) == [(2, 8)]
    assert plan_rows(5, [(0, 3)], 3).runs == ((1, 3),)


def test_without_compression_every_row_stays() -> None:
    plan = plan_rows(6, [(2, 5)], 2, compress=False)
    assert plan.positions == tuple(range(6))
    assert plan.run_of_row == (-1, -1, -1, -1, 0, 0)


@pytest.mark.parametrize("bad", [[(2, 2)], [(3, 7)], [(-1, 2)], [(0, 3), (2, 4)]])
def test_bad_runs(bad: list[Run]) -> None:
    with pytest.raises(ViSpecError, match="image run"):
        plan_rows(6, bad, 2)


MASKED_CASES: list[list[Run]] = [
    [],
    [(3, 9)],
    [(0, 4), (6, 8)],
    [(1, 3), (3, 7), (9, 10), (12, 16)],
]


@pytest.mark.parametrize("num_q", [1, 2, 4])
@pytest.mark.parametrize(
    "config",
    [
        BASE,
        replace(BASE, layer0_input_norm=True, final_norm=True, num_key_value_heads=2),
        replace(BASE, global_feature=False),
        replace(BASE, compress=False),
        replace(BASE, compress=False, global_feature=False),
    ],
    ids=["reference-like", "automodel-like", "no global feature", "uncompressed", "text draft"],
)
@torch.no_grad()
def test_masking_equals_compaction(config: HeadConfig, num_q: int) -> None:
    """One masked batch gives the rows of separate compact prefills."""
    torch.manual_seed(0)
    draft = ViSpecDraft(replace(config, num_query_tokens=num_q))
    if draft.img_fc is not None:
        torch.nn.init.normal_(draft.img_fc.weight, std=0.2)
    length, size = 17, config.hidden_size
    embeds, hidden = torch.randn(2, len(MASKED_CASES), length, size).unbind()
    found = masked_rows(draft, embeds, hidden, MASKED_CASES)
    visible, is_text = found.visible_BL, found.is_text_BL
    positions = torch.arange(length).expand(len(MASKED_CASES), -1)
    out, _ = draft.run_layer(found.layer_in_BLD, positions, attention_mask(visible))
    for b, runs in enumerate(MASKED_CASES):
        last = length - 1  # a prompt of L - 1 tokens whose sampled token is token L - 1
        want = draft.prefill(embeds[b, :last], embeds[b, last], hidden[b, :last], runs)
        index = torch.tensor(want.plan.positions)
        assert visible[b].nonzero().flatten().tolist() == index.tolist()
        assert is_text[b, index].tolist() == [token < 0 for token in want.plan.token_of_row]
        torch.testing.assert_close(out[b, index], want.out_ND, atol=1e-5, rtol=0)


def test_masked_padding_is_invisible() -> None:
    draft = ViSpecDraft(BASE)
    embeds, hidden = torch.randn(2, 2, 8, BASE.hidden_size).unbind()
    found = masked_rows(draft, embeds, hidden, [[(1, 3)], []], [5, 8])
    visible, is_text = found.visible_BL, found.is_text_BL
    assert visible[0].tolist() == [True, True, True, True] + [False] * 4
    assert is_text[0].tolist() == [False, False, True, True] + [False] * 4
    assert visible[1].sum() == 7


def test_fresh_head_ignores_images_and_trains() -> None:
    """img_fc starts as [I | 0]; every parameter but the table gets a gradient."""
    torch.manual_seed(0)
    draft = ViSpecDraft(BASE)
    hidden = torch.randn(1, 4, BASE.hidden_size)
    embeds = torch.randn(1, 4, BASE.hidden_size)
    with torch.no_grad():
        plain = draft.layer_input(embeds, hidden, torch.zeros(1, 1, BASE.hidden_size))
        seen = draft.layer_input(embeds, hidden, torch.ones(1, 1, BASE.hidden_size))
    assert torch.equal(plain, seen)
    found = masked_rows(
        draft, torch.randn(1, 8, BASE.hidden_size), torch.randn(1, 8, BASE.hidden_size), [[(2, 5)]]
    )
    out, _ = draft.run_layer(
        found.layer_in_BLD, torch.arange(8)[None], attention_mask(found.visible_BL)
    )
    out.square().mean().backward()
    without = {name for name, p in draft.named_parameters() if p.grad is None}
    assert without == {"embed_tokens.weight"}


def test_chain_needs_a_table() -> None:
    draft = ViSpecDraft(replace(BASE, has_embed_tokens=False))
    size = BASE.hidden_size
    state = draft.prefill(torch.randn(4, size), torch.randn(size), torch.randn(4, size))
    lm_head = torch.randn(BASE.vocab_size, size)
    with pytest.raises(ValueError, match="pass the target's table"):
        draft.chain(state, 2, lm_head)
    assert len(draft.chain(state, 2, lm_head, torch.randn(BASE.vocab_size, size)).token_ids_S) == 2
