"""Attention of drafts whose gate weighs the branches of a compressor.

The head is wider by some channels more.  In a branch's channel the keys of its tokens hold a
constant and all other keys zero, and a query holds its request's bias in the same unit, so that the
score of such a key gets exactly the bias.  The cached keys say only which branch they are of; what
a request thinks of it comes with its queries.

Shapes: T tokens, K branches, P padded head size, E = heads * P.
"""

from typing import Any

import torch

from vllm_vispec.models.attention import HoleMaskedAttention
from vllm_vispec.spec_decode.row_table import BRANCH_CHANNEL, GatedRowTable


def query_scale(head_dim: int) -> float:
    """What a bias is multiplied by to stand in a query; scores are divided by sqrt(head_dim)."""
    return float(head_dim**0.5 / BRANCH_CHANNEL)


class GatedAttention(HoleMaskedAttention):
    """Masks holes, and adds the request's biases to the scores of the branches' tokens.

    Args:
        rows: The draft's row table; has the codes of the batch's queries and keys.
        Others: As of `HoleMaskedAttention`.
    """

    rows: GatedRowTable

    def __init__(self, *args: Any, rows: GatedRowTable, **kwargs: Any) -> None:
        branches = rows.codes.num_branches
        super().__init__(*args, rows=rows, num_branches=branches, **kwargs)

    def mark(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill the branches' channels; the projections leave zeros there."""
        query_TK, key_TK = self.rows.branch_codes(q.shape[0])
        self._channels(q).add_(query_TK.unsqueeze(1))
        self._channels(k).add_(key_TK.unsqueeze(1))
        return q, k

    def _channels(self, x_TE: torch.Tensor) -> torch.Tensor:
        heads_THP = x_TE.view(x_TE.shape[0], -1, self.padded_size)
        return heads_THP[..., self.head_dim : self.head_dim + self.num_branches]
