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

    A walk visits a node if the target chose it and visits its parent; whether it does is found for
    all nodes at once, over ancestors twice as far up every time.

    Args:
        sampled: int64 ``[R, J]``; the target's token behind each node.
        token: int64 ``[R, J]``; the nodes' own tokens, those of siblings all different; negative
            where there is no node; the root's does not matter.
        parent: int64 ``[R, J]``; each node's parent, less than its own place; the root is its own.
        levels: ``P - 1``; less than J.  Nodes of a longer path count as no nodes: no tree has any.
    """
    num_nodes = sampled.shape[1]
    places_J = torch.arange(num_nodes, device=token.device)
    is_root_J = places_J == 0
    visits_RJ = is_root_J | ((token >= 0) & (token == sampled.gather(1, parent)))
    above_RJ = parent
    for doubling in range((levels - 1).bit_length()):
        if doubling:
            above_RJ = above_RJ.gather(1, above_RJ)
        visits_RJ = visits_RJ & visits_RJ.gather(1, above_RJ)
    # Parents come before children: in a row's order the visited nodes are the path.
    place_RJ = torch.where(visits_RJ, places_J, num_nodes)
    place_RP = place_RJ.topk(levels + 1, dim=1, largest=False, sorted=True).values
    is_on_RP = place_RP < num_nodes
    path_RP = torch.where(is_on_RP, place_RP, places_J[: levels + 1])
    token_RP = torch.where(is_on_RP, sampled.gather(1, path_RP), -1)
    return Walk(path_RP, is_on_RP.sum(1) - 1, token_RP)
