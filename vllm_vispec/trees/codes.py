"""Ancestor-mask codes: head channels in which a tree node sees its ancestors and no other node.

A tree is verified as one row of tokens, parents before children, under plain causal attention.
Each level of a path has n channels, which hold a code word with n // 2 ones; n is the smallest
number with a word for every child that a node may have (five channels for ten children, two for
two).  The word says which of its parent's children a node is.  The query holds ``+s`` where the
words of its path have a one, the key ``-s`` where they have a zero; levels that a path does not
reach hold zeros on both sides.

Against an ancestor's key every product is exactly zero in any dtype, because the words are equal.
A node on another branch has another word at the level where the branches part.  All words have
the same number of ones, so at least one of the query's ones meets a ``-s``, and the logit falls by
``s * s * scale`` or more.  Descendants would pass, but they come later in the row, where causal
attention hides them.

Shapes: T tokens of a batch, S tokens with codes, L levels, n channels of a level, X = n * L, H
heads, h head size, P padded head size, ``...`` any leading dimensions.
"""

from itertools import combinations, islice

import torch
from torch import nn

from vllm_vispec.trees.sizes import MAX_SIBLINGS, channels_per_level

# The branch of a level that a path does not reach.
UNUSED = MAX_SIBLINGS
# A power of two, exact in every dtype.  With the usual scale, one by the root of the head size,
# other branches lie at least 1024 below, up to head sizes of 256.
STRENGTH = 128.0
MIN_LOGIT = 1000.0

# H, h and P.
Shape = tuple[int, int, int]


def mask_logit(scale: float) -> float:
    """Return how far the logit of a masked node lies below at least, given attention's scale."""
    return STRENGTH * STRENGTH * scale


def word_tables(
    siblings: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the code words of queries and of keys at one level, each ``[11, n]`` by branch.

    The last entry, `UNUSED`, is zero in both, and so is every branch that no child has.
    """
    size = channels_per_level(siblings)
    query = torch.zeros(MAX_SIBLINGS + 1, size)
    key = torch.zeros_like(query)
    for branch, ones in enumerate(islice(combinations(range(size), size // 2), siblings)):
        query[branch, list(ones)] = STRENGTH
        key[branch] = query[branch] - STRENGTH
    return query.to(device, dtype), key.to(device, dtype)


def encode(path: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the channels ``[..., X]`` of paths.

    Args:
        path: Integers ``[..., L]``: the branch taken at each level, `UNUSED` beyond the node.
        table: One of `word_tables`.
    """
    return table[path.long()].flatten(-2)


class PaddedBuffer(nn.Module):
    """A static buffer ``[T, H, P]`` that all layers of a shape fill in turn.

    A layer copies its queries or keys into the first h channels of each head.  The channels behind
    them hold the tokens' codes, or zeros, already: one copy a layer and no allocation.

    Args:
        max_num_tokens: Longest batch.
        shape: H, h and P.
        dtype: Of queries and keys.
        device: Where they lie.
    """

    rows: torch.Tensor

    def __init__(
        self, max_num_tokens: int, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        num_heads, self._head_size, padded_size = shape
        rows = torch.zeros(max_num_tokens, num_heads, padded_size, dtype=dtype, device=device)
        self.register_buffer("rows", rows, persistent=False)
        self._views = rows, rows[..., : self._head_size]

    def views(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first rows whole, ``[T, H, P]``, and without their padding, ``[T, H, h]``."""
        # All layers of a pass ask for the same views; making them costs as much as a small copy.
        if num_tokens != self._views[0].shape[0]:
            padded = self.rows[:num_tokens]
            self._views = padded, padded[..., : self._head_size]
        return self._views

    def fill(self, rows: torch.Tensor) -> torch.Tensor:
        """Copy ``[T, H, h]`` in; return ``[T, H, P]``."""
        padded, own = self.views(rows.shape[0])
        own.copy_(rows)
        return padded

    def write_codes(self, codes: torch.Tensor, index: torch.Tensor | None = None) -> None:
        """Write ``codes`` ``[S, X]`` behind all heads of the tokens ``index``, else the first S."""
        num_rows, num_channels = codes.shape
        channels_THX = self.rows[..., self._head_size : self._head_size + num_channels]
        codes_S1X = codes.unsqueeze(1)
        if index is None:
            channels_THX[:num_rows] = codes_S1X
        else:
            channels_THX.index_copy_(0, index, codes_S1X.expand(-1, channels_THX.shape[1], -1))

    def clear_codes(self, num_tokens: int, num_channels: int) -> None:
        """Zero the codes of the first tokens."""
        first = self._head_size
        self.rows[:num_tokens, :, first : first + num_channels].zero_()


class CodeBuffers(nn.Module):
    """The padded buffers of an engine's attention layers, target and draft, and their codes.

    Between passes over trees all codes are zero, which is plain attention.

    Args:
        levels: L.
        siblings: Most children of a node.
        max_num_tokens: Longest batch.
        dtype: Of queries and keys.
        device: Where they lie.

    Attributes:
        setting: What asks for them, for errors.
        has_masks: Whether channels behind the codes mask rows, see `draft_model.masking`.
    """

    setting = "tree"
    has_masks = False
    query_table: torch.Tensor
    key_table: torch.Tensor

    def __init__(
        self,
        levels: int,
        siblings: int,
        max_num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.num_channels = channels_per_level(siblings) * levels
        self._sizes = max_num_tokens, dtype, device
        query_table, key_table = word_tables(siblings, dtype, device)
        self.register_buffer("query_table", query_table, persistent=False)
        self.register_buffer("key_table", key_table, persistent=False)
        self._queries: list[PaddedBuffer] = []
        self._keys: list[PaddedBuffer] = []
        self._num_written = 0

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def query_buffer(self, shape: Shape) -> PaddedBuffer:
        """Return what all layers of a shape fill with queries."""
        return self._share("query", shape, self._queries)

    def key_buffer(self, shape: Shape) -> PaddedBuffer:
        """Return what all layers of a shape fill with keys."""
        return self._share("key", shape, self._keys)

    def plain_buffer(self, name: str, shape: Shape) -> PaddedBuffer:
        """Return what all layers of a shape fill with something that has no codes."""
        return self._share(name, shape, [])

    def clear_codes(self) -> None:
        """Zero all codes: attention is plain again."""
        if self._num_written:
            for buffer in (*self._queries, *self._keys):
                buffer.clear_codes(self._num_written, self.num_channels)
        self._num_written = 0

    def write_target_codes(self, index: torch.Tensor, path: torch.Tensor, num_tokens: int) -> None:
        """Give some tokens of the target's pass codes and clear all others.

        Args:
            index: int64 ``[S]``; which tokens of the batch.
            path: Integers ``[S, L]``; see `encode`.
            num_tokens: Tokens of the batch.
        """
        self.clear_codes()
        self._write(path, index)
        self._num_written = num_tokens

    def write_draft_codes(self, path: torch.Tensor) -> None:
        """Give the first tokens of the draft's pass codes, by integers ``[S, L]``; see `encode`.

        Every level of a tree has as many tokens, so each pass overwrites the codes of the last one.
        """
        self._write(path)
        self._num_written = max(self._num_written, path.shape[0])

    def _write(self, path: torch.Tensor, index: torch.Tensor | None = None) -> None:
        both = (self._queries, self.query_table), (self._keys, self.key_table)
        for buffers, table in both:
            codes = encode(path, table)
            for buffer in buffers:
                buffer.write_codes(codes, index)

    def _share(self, name: str, shape: Shape, group: list[PaddedBuffer]) -> PaddedBuffer:
        full_name = "_".join((name, *map(str, shape)))
        buffer = self._modules.get(full_name)
        if buffer is None:
            max_num_tokens, dtype, device = self._sizes
            buffer = PaddedBuffer(max_num_tokens, shape, dtype, device)
            self.add_module(full_name, buffer)
            group.append(buffer)
        assert isinstance(buffer, PaddedBuffer)
        return buffer
