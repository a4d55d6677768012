"""Path codes of the tokens of the current pass, in the buffers that attention layers fill.

Shapes: S tokens with codes, L levels, H heads, h head size, P padded head size.
"""

from collections.abc import Iterable

import torch
from torch import nn

from vllm_vispec.models.padded_rows import PaddedRows
from vllm_vispec.trees.codes import encode, num_channels, word_tables
from vllm_vispec.trees.settings import TreeSettings

# H, h and P.
Shape = tuple[int, int, int]


class CodeRows(nn.Module):
    """The buffers of an engine's attention layers, target and draft, and the codes in them.

    Between passes over trees all codes are zero, which is plain attention.  It is a part of the
    model whose layer made it: sleeping engines keep a model's buffers, and nothing else.

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
        super().__init__()
        self.num_channels = num_channels(settings.levels, settings.top_k)
        self._max_num_tokens, self._dtype, self._device = max_num_tokens, dtype, device
        query_table, key_table = word_tables(settings.top_k, dtype, device)
        self.query_table: torch.Tensor
        self.key_table: torch.Tensor
        self.register_buffer("query_table", query_table, persistent=False)
        self.register_buffer("key_table", key_table, persistent=False)
        self._queries: list[PaddedRows] = []
        self._keys: list[PaddedRows] = []
        self._written = 0

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def query(self, shape: Shape) -> PaddedRows:
        """Return what all layers of a shape fill with queries."""
        return self._share("query", shape, self._queries)

    def key(self, shape: Shape) -> PaddedRows:
        """Return what all layers of a shape fill with keys."""
        return self._share("key", shape, self._keys)

    def plain(self, name: str, shape: Shape) -> PaddedRows:
        """Return what all layers of a shape fill with something that has no codes."""
        return self._share(name, shape, [])

    def clear(self) -> None:
        """Let all tokens be plain."""
        if self._written:
            for rows in (*self._queries, *self._keys):
                rows.clear_codes(self._written)
        self._written = 0

    def set(self, index: torch.Tensor, path: torch.Tensor, num_tokens: int) -> None:
        """Give some tokens of the target's pass codes and clear all others.

        Args:
            index: int64 ``[S]``; which tokens of the batch.
            path: Integers ``[S, L]``; see `encode`.
            num_tokens: Tokens of the batch.
        """
        self.clear()
        _write(self._queries, encode(path, self.query_table), index)
        _write(self._keys, encode(path, self.key_table), index)
        self._written = num_tokens

    def set_draft(self, path: torch.Tensor) -> None:
        """Give the first tokens of the draft's pass codes, by integers ``[S, L]``; see `encode`.

        A pass after another one of as many tokens overwrites its codes.
        """
        _write(self._queries, encode(path, self.query_table))
        _write(self._keys, encode(path, self.key_table))
        self._written = max(self._written, path.shape[0])

    def _share(self, name: str, shape: Shape, group: list[PaddedRows]) -> PaddedRows:
        full_name = "_".join((name, *map(str, shape)))
        rows = self._modules.get(full_name)
        if rows is None:
            rows = PaddedRows(self._max_num_tokens, *shape, self._dtype, self._device)
            self.add_module(full_name, rows)
            group.append(rows)
        assert isinstance(rows, PaddedRows)
        return rows


def _write(
    buffers: Iterable[PaddedRows], codes: torch.Tensor, index: torch.Tensor | None = None
) -> None:
    for rows in buffers:
        rows.write_codes(codes, index)
