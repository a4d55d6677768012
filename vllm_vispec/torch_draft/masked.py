"""Batched full-length rows for training: masking instead of compaction.

A kept row has its own position, so dropping the other rows of an image equals hiding them from
attention. All samples of a batch then keep the length L, whatever images they hold.

Tensor names end in their shape: B batch, L tokens, D hidden, R image runs of all samples, Q adaptor
rows of a run, N rows that the adaptor fills.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_vispec.torch_draft.rows import RowPlan, Run, plan_rows

if TYPE_CHECKING:
    from vllm_vispec.torch_draft.model import ViSpecDraft


def masked_rows(
    draft: ViSpecDraft,
    embeds_BLD: Tensor,
    hidden_BLD: Tensor,
    runs: Sequence[Sequence[Run]],
    lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Layer inputs of whole sequences, with a mask in place of compaction.

    Args:
        embeds_BLD: target input embeddings of the tokens, NOT shifted (row p takes token p+1; the
            last row of every sequence has no next token and is hidden).
        hidden_BLD: target hidden states after its final norm.
        runs: image runs of each sample, in token indices.
        lengths: valid tokens per sample (right padding); None = all L.

    Returns:
        layer_in_BLD; visible_BL (True where a row exists for others to see and to be trained on:
        text rows and kept image rows); is_text_BL (rows whose output predicts a token); and
        global_BLD, the global feature of every row (zeros before the first image), for further
        draft-on-draft steps. Feed the first to `draft.run_layer` with `attention_mask(visible_BL)`.
    """
    count, total = embeds_BLD.shape[:2]
    config = draft.config
    plans = [
        plan_rows(
            total if lengths is None else lengths[b],
            runs[b],
            config.num_query_tokens,
            compress=config.compress,
        )
        for b in range(count)
    ]
    layout = _lay_out(plans, total)
    images = [embeds_BLD[b, start:end] for b, plan in enumerate(plans) for start, end in plan.runs]
    adapted_RQD = draft.adaptor_rows(images).to(embeds_BLD.dtype)
    zero_B1D = torch.zeros_like(embeds_BLD[:, :1])
    globals_RD = torch.cat((adapted_RQD[:, -1], zero_B1D[0]))
    device = embeds_BLD.device
    global_BLD = globals_RD[layout.run_BL.to(device)]
    shifted_BLD = torch.cat((embeds_BLD[:, 1:], zero_B1D), dim=1)
    layer_in_BLD = draft.layer_input(shifted_BLD, hidden_BLD, global_BLD)
    if len(layout.image_N):
        values_ND = adapted_RQD.flatten(0, 1)[layout.filled_by_N.to(device)]
        rows = layer_in_BLD.flatten(0, 1)
        rows = rows.index_copy(0, layout.image_N.to(device), values_ND.to(rows.dtype))
        layer_in_BLD = rows.unflatten(0, (count, total))
    return layer_in_BLD, layout.visible_BL.to(device), layout.is_text_BL.to(device), global_BLD


@dataclass(frozen=True)
class _Layout:
    """Where things are, on the CPU.

    Attributes:
        run_BL: run whose global feature a row gets, counted over all samples; R for none.
        image_N: rows that the adaptor fills, as b * L + l.
        filled_by_N: their adaptor rows, as r * Q + q.
        visible_BL, is_text_BL: see `masked_rows`.
    """

    run_BL: Tensor
    image_N: Tensor
    filled_by_N: Tensor
    visible_BL: Tensor
    is_text_BL: Tensor


def _lay_out(plans: Sequence[RowPlan], total: int) -> _Layout:
    num_runs = sum(len(plan.runs) for plan in plans)
    run_BL = torch.full((len(plans), total), num_runs)
    visible_BL = torch.zeros(len(plans), total, dtype=torch.bool)
    is_text_BL = torch.zeros_like(visible_BL)
    images: list[Tensor] = []
    fillers: list[Tensor] = []
    first_run = 0
    for b, plan in enumerate(plans):
        index_N, run_N, row_N = map(
            torch.tensor, (plan.positions, plan.run_of_row, plan.adaptor_row)
        )
        is_image_N = row_N >= 0
        run_BL[b, index_N] = torch.where(run_N < 0, num_runs, first_run + run_N)
        # The row of the last token would need the embedding of the token after it.
        inside_N = index_N < plan.length - 1
        visible_BL[b, index_N] = inside_N
        is_text_BL[b, index_N] = inside_N & ~is_image_N
        images.append(b * total + index_N[is_image_N])
        queries = plan.num_query_tokens
        fillers.append((first_run + run_N[is_image_N]) * queries + row_N[is_image_N])
        first_run += len(plan.runs)
    return _Layout(run_BL, torch.cat(images), torch.cat(fillers), visible_BL, is_text_BL)


def attention_mask(visible_BL: Tensor) -> Tensor:
    """Causal mask [B, L, L] that hides dropped rows; every row sees itself (no empty softmax)."""
    total = visible_BL.shape[1]
    causal_LL = torch.ones(total, total, dtype=torch.bool, device=visible_BL.device).tril()
    own_LL = torch.eye(total, dtype=torch.bool, device=visible_BL.device)
    return (visible_BL[:, None, :] & causal_LL) | own_LL
