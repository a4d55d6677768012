"""Static buffers of rows whose heads are wider than their model knows.

A layer copies what it is given into its buffer, where the channels behind it hold path codes or
zeros already: one copy a layer, however many channels there are, and nothing allocated.

Shapes: G layers, T tokens of a batch, S tokens with codes, H heads, h head size, P padded head
size, X channels of codes.
"""

import torch


class PaddedRows:
    """Rows ``[G, T, H, P]`` of some layers.

    Args:
        num_layers: G; layers that take turns can share one.
        max_num_tokens: Longest batch.
        num_heads: H.
        head_size: h.
        padded_size: P.
        dtype: Of the rows.
        device: Where they lie.
    """

    def __init__(
        self,
        num_layers: int,
        max_num_tokens: int,
        num_heads: int,
        head_size: int,
        padded_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = num_layers, max_num_tokens, num_heads, padded_size
        self._rows = torch.zeros(shape, dtype=dtype, device=device)
        self._head_size = head_size
        self.layers = [LayerRows(rows, head_size) for rows in self._rows]

    @property
    def num_bytes(self) -> int:
        """Memory of the buffer."""
        return self._rows.nbytes

    def write_codes(self, codes: torch.Tensor, index: torch.Tensor | None = None) -> None:
        """Write ``codes`` ``[S, X]`` in all layers.

        Args:
            codes: For S tokens.
            index: int64 ``[S]``; which tokens. None: the first ones.
        """
        num_rows, num_channels = codes.shape
        channels_GTHX = self._rows[..., self._head_size : self._head_size + num_channels]
        codes_1S1X = codes[None, :, None]
        if index is None:
            channels_GTHX[:, :num_rows] = codes_1S1X
            return
        num_layers, _, num_heads, _ = channels_GTHX.shape
        codes_GSHX = codes_1S1X.expand(num_layers, -1, num_heads, -1)
        channels_GTHX.index_copy_(1, index, codes_GSHX)

    def clear_codes(self, num_tokens: int) -> None:
        """Let the first tokens be plain."""
        self._rows[:, :num_tokens, :, self._head_size :].zero_()

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Return the rows ``[G, S, H, P]`` of tokens ``index``, int64 ``[S]``."""
        return self._rows.index_select(1, index)


class LayerRows:
    """One layer's rows ``[T, H, P]``; see `PaddedRows`."""

    def __init__(self, rows: torch.Tensor, head_size: int) -> None:
        self._rows, self._head_size = rows, head_size
        self._num_tokens = -1
        self._padded = self._own = rows

    def views(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first rows whole, ``[T, H, P]``, and without their padding, ``[T, H, h]``."""
        # All layers of a pass ask for the same ones: making a view costs as much as a small copy.
        if num_tokens != self._num_tokens:
            self._num_tokens, self._padded = num_tokens, self._rows[:num_tokens]
            self._own = self._padded[..., : self._head_size]
        return self._padded, self._own

    def fill(self, rows: torch.Tensor) -> torch.Tensor:
        """Copy ``[T, H, h]`` in; return ``[T, H, P]``."""
        padded, own = self.views(rows.shape[0])
        own.copy_(rows)
        return padded
