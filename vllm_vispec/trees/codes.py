"""Path codes: head channels that let a tree node see its ancestors and nothing else of the tree.

A tree is laid out as one row of tokens, parents before children, under plain causal attention.
Each level of a path has a few channels: n of them hold a word with n // 2 ones, of which there are
enough for every child a node may have (five channels for ten, two for two).  Which of its parent's
children a node is picks the word.  The query holds ``+s`` where the words of its path are one, the
key ``-s`` where they are zero; levels a path does not reach hold zeros on both sides.

For an ancestor's key every product is zero, exactly, in any dtype.  A node that parts from the
query's path at some level has another word there, with as many ones: at least one of the query's
meets a ``-s``, and the logit falls by ``s * s * scale`` or more.  Descendants, which the codes
would let through, come later in the row, where causal attention hides them.

Shapes: L levels, n channels of a level, ``...`` any leading dimensions.
"""

from itertools import combinations, count, islice
from math import comb

import torch

MAX_SIBLINGS = 10
# The branch of a level that a path does not reach.
UNUSED = MAX_SIBLINGS
# A power of two, exact in every dtype.  With the usual scale, one by the root of the head size,
# other branches lie at least 1024 below, up to head sizes of 256.
STRENGTH = 128.0
MIN_LOGIT = 1000.0


def channels_per_level(siblings: int) -> int:
    """Return the channels n of one level that tell ``siblings`` children apart; 0 for only one."""
    return next(n for n in count() if comb(n, n // 2) >= siblings)


def num_channels(levels: int, siblings: int) -> int:
    """Return the head channels that paths of ``levels`` nodes need."""
    return channels_per_level(siblings) * levels


def mask_logit(scale: float) -> float:
    """Return how far the logit of a hidden node lies below at least, given attention's scale."""
    return STRENGTH * STRENGTH * scale


def word_tables(
    siblings: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a query and what a key holds at one level, each ``[11, n]`` by branch.

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
    """Return the channels ``[..., n * L]`` of paths.

    Args:
        path: Integers ``[..., L]``: the branch taken at each level, `UNUSED` beyond the node.
        table: One of `word_tables`.
    """
    return table[path.long()].flatten(-2)
