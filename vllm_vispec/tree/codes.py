"""Path codes: head channels that let a tree node see its ancestors and nothing else of the tree.

A tree is laid out as one row of tokens, parents before children, under plain causal attention.
Each level of a path has five channels.  Which of its parent's children a node is picks one of the
ten words with two ones.  The query holds ``+s`` where the words of its path are one, the key
``-s`` where they are zero; levels a path does not reach hold zeros on both sides.

For an ancestor's key every product is zero, exactly, in any dtype.  A node that parts from the
query's path at some level has another word there: at least one of the query's two ones meets a
``-s``, and the logit falls by ``s * s * scale`` or more.  Descendants, which the codes would let
through, come later in the row, where causal attention hides them.

Shapes: L levels, ``...`` any leading dimensions.
"""

from itertools import combinations

import torch

CHANNELS_PER_LEVEL = 5
_WORDS = tuple(combinations(range(CHANNELS_PER_LEVEL), 2))
MAX_SIBLINGS = len(_WORDS)
# The branch of a level that a path does not reach.
UNUSED = MAX_SIBLINGS
# A power of two, exact in every dtype.  With the usual scale, one by the root of the head size,
# other branches lie at least 1024 below, up to head sizes of 256.
STRENGTH = 128.0
MIN_LOGIT = 1000.0


def num_channels(levels: int) -> int:
    """Return the head channels that paths of ``levels`` nodes need."""
    return CHANNELS_PER_LEVEL * levels


def mask_logit(scale: float) -> float:
    """Return how far the logit of a hidden node lies below at least, given attention's scale."""
    return STRENGTH * STRENGTH * scale


def word_tables(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a query and what a key holds at one level, each ``[11, 5]`` by branch.

    The last entry, `UNUSED`, is zero in both.
    """
    word = torch.zeros(MAX_SIBLINGS + 1, CHANNELS_PER_LEVEL)
    for branch, ones in enumerate(_WORDS):
        word[branch, list(ones)] = 1.0
    query = STRENGTH * word
    key = -STRENGTH * (1.0 - word)
    key[UNUSED] = 0.0
    return query.to(device, dtype), key.to(device, dtype)


def encode(path: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the channels ``[..., 5 * L]`` of paths.

    Args:
        path: Integers ``[..., L]``: the branch taken at each level, `UNUSED` beyond the node.
        table: One of `word_tables`.
    """
    return table[path.long()].flatten(-2)
