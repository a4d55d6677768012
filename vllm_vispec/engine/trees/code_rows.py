"""What the code channels of the tokens of the current pass hold.

Shapes: T tokens of a batch, S tokens with codes, L levels, X channels.
"""

import torch

from vllm_vispec.tree.codes import encode, num_channels, word_tables
from vllm_vispec.tree.settings import TreeSettings

# Backends serve some head sizes only; so many channels may be left over.
MAX_SPARE_CHANNELS = 128


class CodeRows:
    """Static buffers that all attention layers of an engine read, target and draft.

    Between passes over trees everything is zero, which is plain attention.

    Args:
        settings: How trees are grown.
        max_num_tokens: Longest batch.
        dtype: Of queries and keys.
        device: Where they lie.
    """

    def __init__(
        self,
        settings: TreeSettings,
        max_num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_channels = num_channels(settings.levels)
        width = self.num_channels + MAX_SPARE_CHANNELS
        self._query = torch.zeros(max_num_tokens, width, dtype=dtype, device=device)
        self._key = torch.zeros_like(self._query)
        self._query_table, self._key_table = word_tables(dtype, device)
        self._written = 0

    def clear(self) -> None:
        """Let all tokens be plain."""
        self._query[: self._written] = 0
        self._key[: self._written] = 0
        self._written = 0

    def set(self, index: torch.Tensor, path: torch.Tensor, num_tokens: int) -> None:
        """Give some tokens codes and clear all others.

        Args:
            index: int64 ``[S]``; which tokens of the batch.
            path: Integers ``[S, L]``; see `encode`.
            num_tokens: T.
        """
        self.clear()
        self._query[:, : self.num_channels].index_copy_(0, index, encode(path, self._query_table))
        self._key[:, : self.num_channels].index_copy_(0, index, encode(path, self._key_table))
        self._written = num_tokens

    def query(self, num_tokens: int, width: int) -> torch.Tensor:
        """Return what queries hold, ``[T, 1, width]``."""
        return self._query[:num_tokens, None, :width]

    def key(self, num_tokens: int, width: int) -> torch.Tensor:
        """Return what keys hold, ``[T, 1, width]``."""
        return self._key[:num_tokens, None, :width]
