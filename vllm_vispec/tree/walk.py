"""Choosing the accepted path: a walk along the target's own samples.

At every node the target's own token is taken, drawn as plain decoding would draw it behind that
path.  If a child holds it the walk descends, else the token is emitted and the walk ends.  What
comes out is distributed as plain decoding's output for any tree that was grown without looking at
the draws.

Shapes: R requests, J nodes with the root first, P nodes on the longest path with the root.
"""

from typing import NamedTuple

import torch


class Walk(NamedTuple):
    """What a walk found.

    Attributes:
        path: int64 ``[R, P]``; the nodes visited, the root first.  Behind the last one, its own
            place in the row: moving ``path[i]`` to place ``i`` leaves those as they are.
        accepted: int64 ``[R]``; draft tokens accepted.
        token: int64 ``[R, P]``; the tokens emitted, one more than accepted, then -1.
    """

    path: torch.Tensor
    accepted: torch.Tensor
    token: torch.Tensor


def walk(sampled: torch.Tensor, token: torch.Tensor, parent: torch.Tensor, levels: int) -> Walk:
    """Walk down the trees.

    Args:
        sampled: int64 ``[R, J]``; the target's token behind each node.
        token: int64 ``[R, J]``; the nodes' own tokens, negative where there is no node; the
            root's does not matter.
        parent: int64 ``[R, J]``; each node's parent, less than its own place.
        levels: ``P - 1``; the walk ends there at the latest.
    """
    num_nodes = sampled.shape[1]
    is_node_RJ = (token >= 0) & (torch.arange(num_nodes, device=token.device) > 0)
    at_R1 = torch.zeros_like(parent[:, :1])
    alive_R1 = torch.ones_like(at_R1, dtype=torch.bool)
    path, emitted, accepted_R1 = [at_R1], [sampled[:, :1]], torch.zeros_like(at_R1)
    for level in range(1, levels + 1):
        wanted_R1 = sampled.gather(1, at_R1)
        fits_RJ = is_node_RJ & (parent == at_R1) & (token == wanted_R1)
        alive_R1 = alive_R1 & fits_RJ.any(1, keepdim=True)
        at_R1 = torch.where(alive_R1, fits_RJ.int().argmax(1, keepdim=True), at_R1)
        accepted_R1 = accepted_R1 + alive_R1
        path.append(torch.where(alive_R1, at_R1, min(level, num_nodes - 1)))
        emitted.append(torch.where(alive_R1, sampled.gather(1, at_R1), -1))
    return Walk(torch.cat(path, 1), accepted_R1[:, 0], torch.cat(emitted, 1))
