"""Rows of whole batches for training: masking instead of compaction.

A kept row has its own position, so hiding the other rows of an image from attention equals dropping
them. All samples of a batch then keep one length L, whatever images they hold.

Tensor names end in their shape: B batch, L tokens, D hidden, R image runs of all samples, N rows
that hold a compressor's token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_vispec.compressors.turns import KeyBias
from vllm_vispec.reference.modeling_vispec import ViSpecDraft
from vllm_vispec.reference.rows import RowPlan, Run


@dataclass(frozen=True)
class MaskedRows:
    """Layer inputs of whole sequences.

    Feed `layer_in_BLD` to `draft.run_layer` with `attention_mask(visible_BL)`. For a head with a
    gate also give `attention_mask` the gate's `KeyBias`.

    Attributes:
        layer_in_BLD: input rows of the decoder layer.
        visible_BL: bool, rows that are not dropped: text rows and kept image rows.
        is_text_BL: bool, rows whose output predicts a token.
        global_BLD: the global feature of every row (zeros before the first image), for further
            draft-on-draft steps.
        branch_BL: int64, the compressor's branch that made a kept image row, -1 for other rows.
    """

    layer_in_BLD: Tensor
    visible_BL: Tensor
    is_text_BL: Tensor
    global_BLD: Tensor
    branch_BL: Tensor


def masked_rows(
    draft: ViSpecDraft,
    embeds_BLD: Tensor,
    hidden_BLD: Tensor,
    runs: Sequence[Sequence[Run]],
    lengths: Sequence[int] | None = None,
) -> MaskedRows:
    """Compute the layer inputs of whole sequences.

    Args:
        embeds_BLD: target input embeddings of the tokens, NOT shifted. (Row p takes token p+1. The
            last row of a sequence has no next token and is hidden.)
        hidden_BLD: target hidden states after its final norm.
        runs: images of each sample, in token indices.
        lengths: valid tokens per sample (right padding); None = all L.
    """
    count, total = embeds_BLD.shape[:2]
    device = embeds_BLD.device
    valid = [total] * count if lengths is None else lengths
    plans = [draft.plan(valid[b], runs[b]) for b in range(count)]
    adaptor_RQD, tokens = draft.read_images(
        [embeds_BLD[b, start:end] for b, plan in enumerate(plans) for start, end in plan.images],
        [embeds_BLD[b, start:end] for b, plan in enumerate(plans) for start, end in plan.runs],
    )
    layout = _Layout(*(x.to(device) for x in _lay_out(plans, total, [len(one) for one in tokens])))
    zero_B1D = torch.zeros_like(embeds_BLD[:, :1])
    globals_RD = torch.cat((adaptor_RQD[:, -1].to(embeds_BLD.dtype), zero_B1D[0]))
    global_BLD = globals_RD[layout.run_BL]
    shifted_BLD = torch.cat((embeds_BLD[:, 1:], zero_B1D), dim=1)
    layer_in_BLD = draft.layer_input(shifted_BLD, hidden_BLD, global_BLD)
    if len(layout.image_N):
        values_ND = torch.cat(tokens)[layout.filler_N]
        rows = layer_in_BLD.flatten(0, 1)
        rows = rows.index_copy(0, layout.image_N, values_ND.to(rows.dtype))
        layer_in_BLD = rows.unflatten(0, (count, total))
    return MaskedRows(
        layer_in_BLD, layout.visible_BL, layout.is_text_BL, global_BLD, layout.branch_BL
    )


class _Layout(NamedTuple):
    """Where everything lies, on the CPU.

    Attributes:
        run_BL: run whose global feature a row gets, counted over all samples; R for none.
        image_N: rows that a compressor's token fills, as b * L + l.
        filler_N: these tokens, counted over all images of all samples.
        visible_BL, is_text_BL, branch_BL: see `MaskedRows`.
    """

    run_BL: Tensor
    image_N: Tensor
    filler_N: Tensor
    visible_BL: Tensor
    is_text_BL: Tensor
    branch_BL: Tensor


def _lay_out(plans: Sequence[RowPlan], total: int, counts: Sequence[int]) -> _Layout:
    """Lay samples out; `counts` are the tokens of every image, sample after sample."""
    num_runs = sum(len(plan.runs) for plan in plans)
    run_BL = torch.full((len(plans), total), num_runs)
    branch_BL = torch.full_like(run_BL, -1)
    visible_BL = torch.zeros(len(plans), total, dtype=torch.bool)
    is_text_BL = torch.zeros_like(visible_BL)
    images: list[Tensor] = []
    fillers: list[Tensor] = []
    first_run, left, first_token = 0, list(counts), 0
    for b, plan in enumerate(plans):
        own, left = left[: len(plan.images)], left[len(plan.images) :]
        columns = (plan.positions, plan.run_of_row, plan.filler_of_row(own), plan.branch_of_row)
        # numpy reads a tuple three times as fast as torch.
        index_N, run_N, filler_N, branch_N = torch.from_numpy(np.array(columns, dtype=np.int64))
        is_image_N = filler_N >= 0
        run_BL[b, index_N] = torch.where(run_N < 0, num_runs, first_run + run_N)
        branch_BL[b, index_N] = branch_N
        # The row of the last token would need the embedding of the token after it.
        inside_N = index_N < plan.length - 1
        visible_BL[b, index_N] = inside_N
        is_text_BL[b, index_N] = inside_N & ~is_image_N
        images.append(b * total + index_N[is_image_N])
        fillers.append(first_token + filler_N[is_image_N])
        first_run += len(plan.runs)
        first_token += sum(own)
    return _Layout(run_BL, torch.cat(images), torch.cat(fillers), visible_BL, is_text_BL, branch_BL)


def attention_mask(visible_BL: Tensor, bias: KeyBias | None = None) -> Tensor:
    """Causal mask [B, L, L] that hides dropped rows. Every row sees itself: no softmax is empty.

    Bool, True where a row may look. With a gate's biases it is float32, to be added to scores, and
    -inf where a row may not look. That takes four times the memory, and as much for gradients.
    """
    total = visible_BL.shape[1]
    causal_LL = torch.ones(total, total, dtype=torch.bool, device=visible_BL.device).tril()
    own_LL = torch.eye(total, dtype=torch.bool, device=visible_BL.device)
    sees_BLL = (visible_BL[:, None, :] & causal_LL) | own_LL
    return sees_BLL if bias is None else bias.scores().masked_fill(~sees_BLL, -torch.inf)
