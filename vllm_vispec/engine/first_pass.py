"""The first draft pass over long batches, without the rows whose results nobody reads.

A draft has one layer.  Of its first pass only each request's last row is read afterwards, and the
keys and values of the rows that later queries see.  So holes need no fusion and no projections,
their keys being a constant, and only the last rows need what follows attention.  Attention itself
runs over all rows with vLLM's own metadata, except on CPU (V1), where it is a large part of the
pass: there only the last rows ask, as in the one-token steps that follow.

Shapes: T tokens in the batch, V rows that are no holes, R requests, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

MIN_ROWS = 32
MIN_PROMPT_ROWS = 256


@dataclass(frozen=True)
class FirstPassPlan:
    """Which rows of a first pass are computed.

    Attributes:
        visible: int64 ``[V]``, ascending; rows that are no holes. None if all are visible.
        sampled: int64 ``[R]``; each request's last row, from which its first draft token comes.
        sampled_ask: Attention's metadata is that of the sampled rows alone.
        keys_only: Nothing is drafted (K = 0): the pass only stores keys and values.
    """

    visible: torch.Tensor | None
    sampled: torch.Tensor
    sampled_ask: bool = False
    keys_only: bool = False

    def pick_visible(self, rows_TX: torch.Tensor) -> torch.Tensor:
        """Return the visible rows, ``[V, ...]``."""
        return rows_TX if self.visible is None else rows_TX[self.visible]

    def pick_sampled(self, rows_VX: torch.Tensor) -> torch.Tensor:
        """Return the sampled ones among visible rows, ``[R, ...]``.

        A prompt that ends for now inside an image has no such row; its draft is thrown away, so any
        row will do.
        """
        if self.visible is None:
            return rows_VX[self.sampled]
        place_R = torch.searchsorted(self.visible, self.sampled)
        return rows_VX[place_R.clamp_(max=rows_VX.shape[0] - 1)]

    def spread(self, rows_VX: torch.Tensor, out_TX: torch.Tensor) -> torch.Tensor:
        """Write visible rows to their places in ``out_TX``; the others stay."""
        return rows_VX if self.visible is None else out_TX.index_copy_(0, self.visible, rows_VX)


def is_long(num_rows: Sequence[int], *, on_cpu: bool) -> bool:
    """Whether a batch, rows by request, is long enough for a plan to save anything.

    On a GPU rounds without prompts run as recorded graphs; there only long prompts are worth it.
    """
    if on_cpu:
        return sum(num_rows) >= MIN_ROWS
    return max(num_rows, default=0) >= MIN_PROMPT_ROWS


def visible_rows(codes_T: np.ndarray, hole: int) -> np.ndarray:
    """Return the indices, int64 ``[V]``, of rows whose code is not that of a hole."""
    return np.flatnonzero(codes_T != hole)
