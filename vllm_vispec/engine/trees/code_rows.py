"""Path codes of the tokens of the current pass, in the buffers that attention layers fill.

Shapes: S tokens with codes, L levels.
"""

from collections.abc import Iterable

import torch

from vllm_vispec.engine.trees.padded_rows import LayerRows, PaddedRows
from vllm_vispec.tree.codes import encode, num_channels, word_tables
from vllm_vispec.tree.settings import TreeSettings

# Number of heads, head size, padded head size.
Shape = tuple[int, int, int]


class CodeRows:
    """The buffers of an engine's attention layers, target and draft, and the codes in them.

    Between passes over trees all codes are zero, which is plain attention.

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
        self.num_channels = num_channels(settings.levels, settings.top_k)
        self.max_num_tokens, self._dtype, self._device = max_num_tokens, dtype, device
        self._query_table, self._key_table = word_tables(settings.top_k, dtype, device)
        self._shared: dict[tuple[str, Shape], PaddedRows] = {}
        self._queries: list[PaddedRows] = []
        self._keys: list[PaddedRows] = []
        # The target's layers, each with a buffer of its own.
        self._target_keys: list[PaddedRows] = []
        self._written = self._target_written = 0

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers that layers share."""
        return sum(rows.num_bytes for rows in self._shared.values())

    def query(self, shape: Shape) -> LayerRows:
        """Return what all layers of a shape fill with queries."""
        return self._share("query", shape, self._queries)

    def key(self, shape: Shape) -> LayerRows:
        """Return what all layers of a shape fill with keys."""
        return self._share("key", shape, self._keys)

    def plain(self, name: str, shape: Shape) -> LayerRows:
        """Return what all layers of a shape fill with something that has no codes."""
        return self._share(name, shape, [])

    def new_keys(self, num_layers: int, shape: Shape) -> PaddedRows:
        """Return buffers that each layer of the target has to itself, for keys."""
        rows = self.new_rows(num_layers, shape)
        self._target_keys.append(rows)
        return rows

    def new_rows(self, num_layers: int, shape: Shape) -> PaddedRows:
        """Return buffers that each layer has to itself, without codes."""
        return PaddedRows(num_layers, self.max_num_tokens, *shape, self._dtype, self._device)

    def clear(self) -> None:
        """Let all tokens be plain."""
        _clear((*self._queries, *self._keys), self._written)
        _clear(self._target_keys, self._target_written)
        self._written = self._target_written = 0

    def set(self, index: torch.Tensor, path: torch.Tensor, num_tokens: int) -> None:
        """Give some tokens of the target's pass codes and clear all others.

        Args:
            index: int64 ``[S]``; which tokens of the batch.
            path: Integers ``[S, L]``; see `encode`.
            num_tokens: Tokens of the batch.
        """
        self.clear()
        _write(self._queries, encode(path, self._query_table), index)
        _write((*self._keys, *self._target_keys), encode(path, self._key_table), index)
        self._written = self._target_written = num_tokens

    def set_draft(self, path: torch.Tensor) -> None:
        """Give the first tokens of the draft's pass codes, by integers ``[S, L]``; see `encode`.

        A pass after another one of as many tokens overwrites its codes.
        """
        _write(self._queries, encode(path, self._query_table))
        _write(self._keys, encode(path, self._key_table))
        self._written = max(self._written, path.shape[0])

    def _share(self, name: str, shape: Shape, group: list[PaddedRows]) -> LayerRows:
        rows = self._shared.get((name, shape))
        if rows is None:
            rows = self._shared[name, shape] = self.new_rows(1, shape)
            group.append(rows)
        return rows.layers[0]


def _clear(buffers: Iterable[PaddedRows], num_tokens: int) -> None:
    if num_tokens:
        for rows in buffers:
            rows.clear_codes(num_tokens)


def _write(
    buffers: Iterable[PaddedRows], codes: torch.Tensor, index: torch.Tensor | None = None
) -> None:
    for rows in buffers:
        rows.write_codes(codes, index)
