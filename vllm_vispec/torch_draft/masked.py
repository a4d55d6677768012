"""Batched full-length rows for training: masking instead of compaction.

A kept row has its own position, so dropping the other rows of an image equals hiding them from
attention. All samples of a batch then keep the length L, whatever images they hold.

Tensor names end in their shape: B batch, L tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_vispec.torch_draft.rows import Run, plan_rows

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
    samples = [
        _sample_rows(
            draft,
            embeds_BLD[b],
            hidden_BLD[b],
            sample_runs,
            embeds_BLD.shape[1] if lengths is None else lengths[b],
        )
        for b, sample_runs in enumerate(runs)
    ]
    layer_in, visible, is_text, global_rows = zip(*samples, strict=True)
    return (
        torch.stack(layer_in),
        torch.stack(visible),
        torch.stack(is_text),
        torch.stack(global_rows),
    )


def _sample_rows(
    draft: ViSpecDraft, embeds_LD: Tensor, hidden_LD: Tensor, runs: Sequence[Run], length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    config = draft.config
    plan = plan_rows(length, runs, config.num_query_tokens, compress=config.compress)
    device, total = embeds_LD.device, len(embeds_LD)
    index_N = torch.tensor(plan.positions, device=device)
    run_N = torch.tensor(plan.run_of_row, device=device)
    row_N = torch.tensor(plan.adaptor_row, device=device)
    adapted = [draft.adaptor(embeds_LD[a:b]) for a, b in plan.runs]
    zero_1D = torch.zeros_like(embeds_LD[:1])
    globals_RD = torch.cat([rows_QD[-1:] for rows_QD in adapted] + [zero_1D])
    run_L = torch.full((total,), len(plan.runs), device=device)
    run_L[index_N] = torch.where(run_N < 0, len(plan.runs), run_N)
    global_LD = globals_RD[run_L]
    shifted_LD = torch.cat((embeds_LD[1:], zero_1D))
    layer_in_LD = draft.layer_input(shifted_LD, hidden_LD, global_LD)
    image_N = row_N >= 0
    if bool(image_N.any()):
        values = torch.stack(adapted)[run_N[image_N], row_N[image_N]]
        layer_in_LD = layer_in_LD.index_copy(0, index_N[image_N], values)
    visible_L = torch.zeros(total, dtype=torch.bool, device=device)
    visible_L[index_N] = True
    is_text_L = torch.zeros_like(visible_L)
    is_text_L[index_N] = ~image_N
    # The row of the last token would need the embedding of the token after it.
    visible_L[length - 1 :] = False
    is_text_L[length - 1 :] = False
    return layer_in_LD, visible_L, is_text_L, global_LD


def attention_mask(visible_BL: Tensor) -> Tensor:
    """Causal mask [B, L, L] that hides dropped rows; every row sees itself (no empty softmax)."""
    total = visible_BL.shape[1]
    causal_LL = torch.ones(total, total, dtype=torch.bool, device=visible_BL.device).tril()
    own_LL = torch.eye(total, dtype=torch.bool, device=visible_BL.device)
    return (visible_BL[:, None, :] & causal_LL) | own_LL
