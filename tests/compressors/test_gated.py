"""Biases through padded channels equal an additive mask; masked positions stay invisible.

Shapes: T rows, H heads, h head size, P padded head size, K branches.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vllm_vispec.compressors.gate import HIDDEN_BIAS
from vllm_vispec.compressors.gated import (
    PROMPTS_PER_REQUEST,
    GatedAttention,
    GatedRowTable,
    PromptLengths,
    query_scale,
)
from vllm_vispec.models.padded_heads import MIN_MASK_LOGIT, least_head_size, mask_logit
from vllm_vispec.spec_decode.step import DraftStep, RowIds

HEADS, HEAD, EXTRA, ROWS = 2, 16, 32, 9
IDS = RowIds(num_slots=1, num_query_tokens=1, num_branches=3)


def gated(dtype: torch.dtype) -> GatedAttention:
    """The attention's own arithmetic, without vLLM's layers."""
    attention = GatedAttention.__new__(GatedAttention)
    nn.Module.__init__(attention)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    attention.rows = GatedRowTable(IDS, HEADS * HEAD, ROWS, num_decisions=4)
    torch.set_default_dtype(before)
    attention.head_dim, attention.padded_size, attention.num_branches = HEAD, HEAD + EXTRA, 3
    return attention


def set_step(rows: GatedRowTable, ids: list[int], decisions: list[int]) -> None:
    both = (torch.tensor(values, dtype=torch.int32) for values in (ids, decisions))
    rows.set_step(DraftStep(next(both), decisions_T=next(both)))


def scores(q_TE: torch.Tensor, k_TE: torch.Tensor, size: int) -> torch.Tensor:
    """Attention scores [H, T, T]."""
    q_HTP, k_HTP = (x.float().unflatten(-1, (HEADS, size)).transpose(0, 1) for x in (q_TE, k_TE))
    return q_HTP @ k_HTP.transpose(1, 2) * HEAD**-0.5


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.01)]
)
@torch.no_grad()
def test_biases_equal_an_additive_mask(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    attention, size = gated(dtype), HEADS * HEAD
    rows = attention.rows
    weights = {f"{name}_proj.weight": torch.randn(size, size) * 0.1 for name in "qkvo"}
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    bias_CK = torch.tensor([[0, HIDDEN_BIAS, HIDDEN_BIAS], [-0.5, -1.2, -2.7]])
    rows.write_decisions(torch.tensor([1, 2]), bias_CK * query_scale(HEAD))
    first = IDS.branch(0)
    ids = [0, first, IDS.masked, first + 1, first + 2, IDS.masked, first, 0, 0]
    decisions = [0, 1, 1, 1, 1, 2, 2, 2, 2]
    set_step(rows, ids, decisions)
    wide = attention.pad_weights(weights)
    x_TD = torch.randn(ROWS, size).to(dtype)
    q_TE, k_TE = (
        F.linear(x_TD, wide[f"{n}_proj.weight"], wide[f"{n}_proj.bias"].to(dtype)) for n in "qk"
    )
    q_TE, k_TE = attention.add_channels(q_TE, k_TE)
    channels = torch.zeros(1, HEADS, HEAD + EXTRA, dtype=dtype)
    channels[..., HEAD + 3 :] = 1
    k_TE = k_TE + rows.key_mask_of(ROWS) * channels.flatten(1)
    found_HTT = scores(q_TE, k_TE, HEAD + EXTRA)

    plain_q, plain_k = (F.linear(x_TD, weights[f"{name}_proj.weight"]) for name in "qk")
    biases_C4 = F.pad(torch.cat((torch.zeros(1, 3), bias_CK)), (0, 1))
    branch_T = torch.tensor([row_id - first if row_id >= first else 3 for row_id in ids])
    wanted_HTT = scores(plain_q, plain_k, HEAD) + biases_C4[torch.tensor(decisions)][:, branch_T]
    seen_T = torch.tensor(ids) != IDS.masked
    torch.testing.assert_close(
        found_HTT[..., seen_T].softmax(-1),
        wanted_HTT[..., seen_T].softmax(-1),
        atol=tolerance,
        rtol=0,
    )
    assert bool((found_HTT.softmax(-1)[..., ~seen_T] == 0).all())


@pytest.mark.parametrize(("branches", "least"), [(0, 131), (5, 136), (6, 137)])
def test_masking_keeps_enough_channels(branches: int, least: int) -> None:
    """Beside five branches, eight channels more mask a head of 128 still."""
    assert least_head_size(128, branches) == least
    assert mask_logit(128, least - 128 - branches) >= MIN_MASK_LOGIT


@torch.no_grad()
def test_rows_keep_their_own_channels() -> None:
    attention = gated(torch.float32)
    rows = attention.rows
    rows.write_decisions(torch.tensor([1]), torch.tensor([[1.0, 2.0, 3.0]]))
    set_step(rows, [0, IDS.masked, IDS.branch(2)], [0, 1, 1])
    assert rows.batch_branch_query[:3].tolist() == [[0, 0, 0], [1, 2, 3], [1, 2, 3]]
    assert rows.batch_branch_key[:3].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 128]]
    rows.select_rows(torch.tensor([2]))
    assert rows.batch_branch_query[:1].tolist() == [[1, 2, 3]]


def test_prompt_lengths_are_noted_until_others_need_the_room() -> None:
    added: list[str] = []
    state = SimpleNamespace(add_request=lambda index, new: added.append(new.req_id))
    prompts = PromptLengths(1)
    prompts.follow(state)
    names = [str(index) for index in range(PROMPTS_PER_REQUEST)]
    for length, name in enumerate((*names, "0", "new"), start=1):
        state.add_request(1, SimpleNamespace(req_id=name, prompt_len=length))
    assert added == [*names, "0", "new"]
    lengths = [prompts.length_of(name) for name in ("0", "1", "new", "dummy")]
    assert lengths == [PROMPTS_PER_REQUEST + 1, 0, PROMPTS_PER_REQUEST + 2, 0]
