"""Static buffers of rows whose heads are wider than their model knows.

A layer copies what it is given into its buffer, where the channels behind it hold path codes or
zeros already: one copy a layer, however many channels there are, and nothing allocated.

Shapes: T tokens of a batch, S tokens with codes, H heads, h head size, P padded head size, X
channels of codes.
"""

import torch
from torch import nn


class PaddedRows(nn.Module):
    """Rows ``[T, H, P]`` that all layers of a shape fill in turn.

    Args:
        max_num_tokens: Longest batch.
        num_heads: H.
        head_size: h.
        padded_size: P.
        dtype: Of the rows.
        device: Where they lie.
    """

    def __init__(
        self,
        max_num_tokens: int,
        num_heads: int,
        head_size: int,
        padded_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        rows = torch.zeros(max_num_tokens, num_heads, padded_size, dtype=dtype, device=device)
        self.rows: torch.Tensor
        self.register_buffer("rows", rows, persistent=False)
        self._head_size = head_size
        self._num_tokens = max_num_tokens
        self._views = rows, rows[..., :head_size]

    def views(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first rows whole, ``[T, H, P]``, and without their padding, ``[T, H, h]``."""
        # All layers of a pass ask for the same ones: making a view costs as much as a small copy.
        if num_tokens != self._num_tokens:
            padded = self.rows[:num_tokens]
            self._num_tokens, self._views = num_tokens, (padded, padded[..., : self._head_size])
        return self._views

    def fill(self, rows: torch.Tensor) -> torch.Tensor:
        """Copy ``[T, H, h]`` in; return ``[T, H, P]``."""
        padded, own = self.views(rows.shape[0])
        own.copy_(rows)
        return padded

    def write_codes(self, codes: torch.Tensor, index: torch.Tensor | None = None) -> None:
        """Write ``codes`` ``[S, X]`` behind all heads.

        Args:
            codes: For S tokens.
            index: int64 ``[S]``; which tokens. None: the first ones.
        """
        num_rows, num_channels = codes.shape
        channels_THX = self.rows[..., self._head_size : self._head_size + num_channels]
        codes_S1X = codes.unsqueeze(1)
        if index is None:
            channels_THX[:num_rows] = codes_S1X
        else:
            channels_THX.index_copy_(0, index, codes_S1X.expand(-1, channels_THX.shape[1], -1))

    def clear_codes(self, num_tokens: int) -> None:
        """Let the first tokens be plain."""
        self.rows[:num_tokens, :, self._head_size :].zero_()
