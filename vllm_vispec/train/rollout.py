"""Rollout passes: the draft reads its own output, batched over samples, with gradients.

Row p pairs the state at token p with the embedding of token p + 1 and predicts token p + 2, so the
target's state for it is hidden p + 1. Pass 0 reads the target's states; pass s reads the draft's
own output of pass s - 1, one row earlier. Two modes:

* "exact": a row of pass s sees the target's rows up to p - s and then its own chain (pass 1 at row
  p - s + 1 up to pass s at row p): what the engine computes when it drafts token p + 2 as its
  (s + 1)-th token and everything before was right. EAGLE-3's training-time test (arXiv 2503.01840,
  section 3.2), here for rows of compressed images.
* "shifted": all rows of a pass see each other causally, image rows included; every pass has the
  rows of pass 0. ViSpec's multi-token prediction (arXiv 2509.15235, section 3.4 and its code).

A draft VLM and a published model read no states, so they have one pass only, over all tokens of a
sample.

Tensor names end in their shape: B samples, L rows of a whole sample (= tokens), N rows from the
first counted one to the end, S earlier passes, D hidden, H query heads, G key/value heads, K
head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vllm_vispec.reference import (
    Decision,
    Draft,
    DraftVlm,
    KeyBias,
    MaskedRows,
    ViSpecDraft,
    attention_mask,
    decide,
    masked_rows,
)
from vllm_vispec.reference.layers import KVCache, apply_rope
from vllm_vispec.train.memory import part
from vllm_vispec.train.published import PublishedModel
from vllm_vispec.train.target import DraftBatch

# The reference scales its feature noise with 512 / (tokens of the sample).
NOISE_REFERENCE_LENGTH = 512
# Numbers of rows are multiples of this where that costs nothing but a few rows: kernels are
# prepared per shape (21 ms for one bfloat16 attention backward on a CPU), so shapes must repeat.
ROW_MULTIPLE = 32
# Attention weights of all chain passes that may be held for the backward pass. Above it, each pass
# is computed again there, and the weights of one are held at a time.
MOST_WEIGHT_BYTES = 4 * 2**30


@dataclass(frozen=True)
class PassOutput:
    """What one pass computed.

    Attributes:
        state_BLD: draft output of every row, what lm_head and the next pass read. Only rows that
            count here or in a later pass have a meaning.
        counts_BL: bool, rows to train and to measure. Exact: row p is a text row, tokens p - s + 2
            up to p + 2 are answer tokens and so are their rows. Shifted: as in pass 0.
    """

    state_BLD: Tensor
    counts_BL: Tensor


@dataclass(frozen=True)
class _Rows(MaskedRows):
    """Rows of a batch as pass 0 reads them; `bias` is None for a head without a gate."""

    shifted_BLD: Tensor
    positions_BL: Tensor
    bias: KeyBias | None

    @property
    def mask_BLL(self) -> Tensor:
        """What the rows of pass 0 see of each other."""
        return attention_mask(self.visible_BL, self.bias)


Past = Sequence[KVCache]
"""Keys (after RoPE) and values of each pass: the first [B, G, L, K], later ones [B, G, N, K]."""


def rollout(
    draft: Draft,
    batch: DraftBatch,
    passes: int,
    mode: str = "exact",
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    decision: Decision | None = None,
) -> list[PassOutput]:
    """Run `passes` passes over a batch; pass 0 is the teacher-forced one.

    Args:
        batch: on the draft's device, in its dtype (or under autocast).
        mode: a name in `MODES`; see above.
        noise: width of the uniform noise on the target's states that pass 0 reads, times 512 /
            (tokens of the sample); the reference uses 0.2 (papers' code, not in the text).
        generator: source of the noise.
        decision: of a head's gate; None: its first choice without noise, as in the engine. It reads
            the target's states without noise.
    """
    if isinstance(draft, (DraftVlm, PublishedModel)):
        state_BLD = (
            draft(batch)
            if isinstance(draft, PublishedModel)
            else draft(batch.ids_BL, batch.embeds_BLD, batch.runs)
        )
        counts_BL = first_counts(batch, torch.ones_like(batch.answer_BL))
        return [PassOutput(state_BLD, counts_BL)] * passes
    assert isinstance(draft, ViSpecDraft)  # there is no other class
    if decision is None:
        decision = decide(draft.compressor, batch.hidden_BLD, batch.answer_BL, batch.runs)
    noisy = replace(batch, hidden_BLD=_with_noise(batch, noise, generator))
    return MODES[mode](draft, noisy, _first_rows(draft, noisy, decision), passes)


def _with_noise(batch: DraftBatch, noise: float, generator: torch.Generator | None) -> Tensor:
    if noise == 0:
        return batch.hidden_BLD
    hidden_BLD = batch.hidden_BLD
    device = hidden_BLD.device if generator is None else generator.device
    uniform_BLD = torch.rand(hidden_BLD.shape, generator=generator, device=device) - 0.5
    width_B = torch.tensor([noise * NOISE_REFERENCE_LENGTH / n for n in batch.lengths])
    scaled_BLD = uniform_BLD * width_B.to(device)[:, None, None]
    return hidden_BLD + scaled_BLD.to(hidden_BLD)


def _first_rows(draft: ViSpecDraft, batch: DraftBatch, decision: Decision | None) -> _Rows:
    rows = masked_rows(draft, batch.embeds_BLD, batch.hidden_BLD, batch.runs, batch.lengths)
    count, total = batch.ids_BL.shape
    positions_L = torch.arange(total, device=batch.ids_BL.device)
    return _Rows(
        **vars(rows),
        shifted_BLD=F.pad(batch.embeds_BLD[:, 1:], (0, 0, 0, 1)),
        positions_BL=positions_L.expand(count, -1),
        bias=None if decision is None else decision.key_bias(rows.branch_BL),
    )


def first_counts(batch: DraftBatch, is_text_BL: Tensor) -> Tensor:
    """Rows of pass 0 that predict an answer token: bool [B, L]."""
    return F.pad(batch.answer_BL[:, 2:], (0, 2)) & is_text_BL


def _exact(draft: ViSpecDraft, batch: DraftBatch, rows: _Rows, passes: int) -> list[PassOutput]:
    first_BL = first_counts(batch, rows.is_text_BL)
    with part("rollout pass 0"):
        state_BLD, cache = draft.run_layer(
            rows.layer_in_BLD, rows.positions_BL, rows.mask_BLL, wanted_R=_wanted(first_BL)
        )
    outputs, past = [PassOutput(state_BLD, first_BL)], [cache]
    start = _first_needed(_next_counts(first_BL, first_BL)) if passes > 1 else 0
    count, total = first_BL.shape
    # Weights in float32 and in the values' dtype.
    weight_bytes = (
        6 * (passes - 1) * count * draft.config.num_attention_heads * (total - start) * total
    )
    once = weight_bytes <= MOST_WEIGHT_BYTES or not torch.is_grad_enabled()
    for number in range(1, passes):
        last = outputs[-1]
        counts_BL = _next_counts(last.counts_BL, first_BL)
        wanted_R = _wanted(counts_BL[:, start:])
        arguments = (draft, rows, tuple(past), last.state_BLD, start, wanted_R)
        with part(f"rollout pass {number}"):
            state_BND, own = (
                _chain_pass(*arguments)
                if once
                else checkpoint(_chain_pass, *arguments, use_reentrant=False)
            )
        past.append(own)
        outputs.append(PassOutput(F.pad(state_BND, (0, 0, start, 0)), counts_BL))
    return outputs


def _next_counts(counts_BL: Tensor, first_BL: Tensor) -> Tensor:
    """Rows of the next pass: a chain goes on where its last row counted and this one does."""
    return F.pad(counts_BL[:, :-1], (1, 0)) & first_BL


def _wanted(counts_BN: Tensor) -> Tensor:
    """Rows that count, as b * N + n: others, such as prompts, only give keys and values.

    A few other rows fill the number up to a multiple, so that shapes repeat.
    """
    count = int(counts_BN.sum())
    order_R = torch.argsort((~counts_BN).flatten().to(torch.uint8), stable=True)
    return order_R[: count + -count % ROW_MULTIPLE]


def _first_needed(counts_BL: Tensor) -> int:
    """First row that any later pass needs: prompts are long, their rows need no chains."""
    used_L = counts_BL.any(dim=0)
    first = int(used_L.long().argmax()) if bool(used_L.any()) else len(used_L) - 1
    return first // ROW_MULTIPLE * ROW_MULTIPLE


def _chain_pass(
    draft: ViSpecDraft, rows: _Rows, past: Past, last_BLD: Tensor, start: int, wanted_R: Tensor
) -> tuple[Tensor, KVCache]:
    """One pass after the first for rows `start`..L-1; returns its states, keys and values.

    States of other rows than `wanted_R` have no meaning.
    """
    positions_BN = rows.positions_BL[:, start:]
    # Row 0 has no row before it; it never counts here, any state will do.
    before_BND = F.pad(last_BLD, (0, 0, 1, 0))[:, start:-1]
    x_BND = draft.layer_input(
        rows.shifted_BLD[:, start:], before_BND.to(rows.shifted_BLD), rows.global_BLD[:, start:]
    )
    layer, attention = draft.layer, draft.layer.self_attn
    normed_BND = x_BND if layer.input_layernorm is None else layer.input_layernorm(x_BND)

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    q_BHNK = apply_rope(heads(attention.q_proj(normed_BND)), positions_BN, attention.theta)
    k_BGNK = apply_rope(heads(attention.k_proj(normed_BND)), positions_BN, attention.theta)
    own = (k_BGNK, heads(attention.v_proj(normed_BND)))
    attended_BHNK = _attend(q_BHNK, (*past, own), rows, start)
    x_BND = x_BND + attention.o_proj(attended_BHNK.transpose(1, 2).flatten(2))
    x_BND = layer.feed_forward(x_BND, wanted_R)
    return (x_BND if draft.norm is None else draft.norm(x_BND)), own


def _attend(q_BHNK: Tensor, past: Past, rows: _Rows, start: int) -> Tensor:
    """Attention of pass s over target rows up to p - s and the row's own chain.

    Args:
        past: of passes 0 to s.
    """
    passes, total = len(past) - 1, rows.visible_BL.shape[1]
    groups = q_BHNK.shape[1] // past[0][0].shape[1]
    scale = q_BHNK.shape[-1] ** -0.5
    (k_BHLK, v_BHLK), *own = [
        [x.repeat_interleave(groups, dim=1) for x in keys_and_values] for keys_and_values in past
    ]
    # Pass number n of the chain stands s - n rows earlier; zeros where no counted row looks.
    own = [
        [F.pad(x, (0, 0, passes - number, 0))[:, :, : x.shape[2]] for x in keys_and_values]
        for number, keys_and_values in enumerate(own, start=1)
    ]
    row_N = torch.arange(start, total, device=q_BHNK.device)
    sees_NL = torch.arange(total, device=q_BHNK.device) <= row_N[:, None] - passes
    sees_B1NL = rows.visible_BL[:, None, None, :] & sees_NL
    target_BHNL = q_BHNK @ k_BHLK.transpose(-1, -2) * scale
    if rows.bias is not None:
        target_BHNL = target_BHNL + rows.bias.scores(start)[:, None]
    target_BHNL = target_BHNL.masked_fill(~sees_B1NL, -torch.inf)
    own_BHNS = torch.stack([(q_BHNK * k).sum(-1) * scale for k, _ in own], dim=-1)
    # The row itself is always there, so no softmax is empty.
    weight = torch.cat((target_BHNL, own_BHNS.to(target_BHNL)), -1).float().softmax(-1)
    weight = weight.to(v_BHLK.dtype)
    out_BHNK = weight[..., :total] @ v_BHLK
    for number, (_, v) in enumerate(own):
        out_BHNK = out_BHNK + weight[..., total + number, None] * v
    return out_BHNK


def _shifted(draft: ViSpecDraft, batch: DraftBatch, rows: _Rows, passes: int) -> list[PassOutput]:
    counts_BL = first_counts(batch, rows.is_text_BL)
    mask_BLL = rows.mask_BLL
    # A row whose predecessor was dropped, and the first one, keep the target's state.
    has_before_BL1 = F.pad(rows.visible_BL[:, :-1], (1, 0))[..., None]
    outputs: list[PassOutput] = []
    layer_in_BLD = rows.layer_in_BLD
    for number in range(passes):
        with part(f"rollout pass {number}"):
            state_BLD, _ = draft.run_layer(layer_in_BLD, rows.positions_BL, mask_BLL)
        outputs.append(PassOutput(state_BLD, counts_BL))
        before_BLD = F.pad(state_BLD, (0, 0, 1, 0))[:, :-1].to(batch.hidden_BLD)
        hidden_BLD = torch.where(has_before_BL1, before_BLD, batch.hidden_BLD)
        text_BLD = draft.layer_input(rows.shifted_BLD, hidden_BLD, rows.global_BLD)
        layer_in_BLD = torch.where(rows.is_text_BL[..., None], text_BLD, rows.layer_in_BLD)
    return outputs


Mode = Callable[[ViSpecDraft, DraftBatch, _Rows, int], list[PassOutput]]
MODES: Mapping[str, Mode] = {"exact": _exact, "shifted": _shifted}
