"""The trees of all requests on the device, and one round of verification over them.

Shapes: R requests of a batch, S rows of logits (every request's last token and its drafts), T
tokens of a batch, N nodes, J = N + 1 nodes with the root, L levels, P = L + 1.
"""

from typing import NamedTuple

import torch
from torch import nn

from vllm_vispec.trees.codes import UNUSED
from vllm_vispec.trees.grow import NO_TOKEN, DraftTree
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.trees.walk import Walk, walk

# vLLM's slot of the requests that pad a recorded batch.
NO_REQUEST = -1


class TreeTable(nn.Module):
    """The shape of each request's tree, by slot; the tokens travel with vLLM's drafts.

    The slot `no_tree`, behind all others, is a plain row of drafts: node i is the child of node
    i - 1. What is written to `NO_REQUEST` belongs to nobody.

    The buffers are a module's: those of its models are all that vLLM keeps when an engine sleeps.

    Args:
        settings: How trees are grown.
        num_nodes: N.
        num_slots: Most requests at once.
        device: Where it lies.
    """

    def __init__(
        self, settings: TreeSettings, num_nodes: int, num_slots: int, device: torch.device
    ) -> None:
        super().__init__()
        self.levels, self.num_nodes, self.no_tree = settings.levels, num_nodes, num_slots
        depth_J = torch.arange(num_nodes + 1, device=device)
        rows = {
            "depth": depth_J,
            "parent": (depth_J - 1).clamp_(min=0),
            # A plain row is accepted as far as trees are deep, and no further.
            "is_node": (depth_J > 0) & (depth_J <= settings.levels),
            "path": torch.full((num_nodes + 1, settings.levels), UNUSED, device=device),
        }
        for name, row in rows.items():
            # One more for `no_tree`, and the last one for `NO_REQUEST`.
            table = row.repeat(num_slots + 2, *(1 for _ in row.shape))
            self.register_buffer(name, table, persistent=False)
        self.depth: torch.Tensor
        self.parent: torch.Tensor
        self.is_node: torch.Tensor
        self.path: torch.Tensor

    def write(self, slots: slice | torch.Tensor, tree: DraftTree) -> None:
        """Keep the trees of a batch; the root comes before them and never changes."""
        self.depth[slots, 1:] = tree.depth
        self.parent[slots, 1:] = tree.parent
        self.is_node[slots, 1:] = tree.token != NO_TOKEN
        self.path[slots, 1:] = tree.path

    def read(self, slots: torch.Tensor, token: torch.Tensor) -> DraftTree:
        """Return the trees of a batch, whose drafts are ``token`` ``[R, N]``."""
        is_node_RN = self.is_node[slots, 1:]
        return DraftTree(
            token.masked_fill(~is_node_RN, NO_TOKEN),
            self.parent[slots, 1:],
            self.depth[slots, 1:],
            self.path[slots, 1:],
        )

    def write_chains(self, slots: torch.Tensor) -> None:
        """Let the drafts of a batch be plain rows."""
        for rows in (self.depth, self.parent, self.is_node, self.path):
            rows[slots] = rows[self.no_tree].clone()

    def walk(
        self,
        slot_R: torch.Tensor,
        start_R: torch.Tensor,
        count_R: torch.Tensor,
        sampled_S: torch.Tensor,
        token_S: torch.Tensor,
    ) -> Walk:
        """Walk down the trees of a batch, described as for `TreeRound`.

        Args:
            slot_R: The requests' slots.
            start_R: Their first rows of logits.
            count_R: Their drafts.
            sampled_S: The target's own token behind each row.
            token_S: Each row's own draft token; the roots' do not matter.
        """
        places_J = torch.arange(self.num_nodes + 1, device=sampled_S.device)
        is_node_RJ = self.is_node[slot_R] & (places_J <= count_R.unsqueeze(1))
        row_RJ = _rows(start_R, count_R, places_J)
        token_RJ = token_S[row_RJ].masked_fill(~is_node_RJ, NO_TOKEN)
        return walk(sampled_S[row_RJ].long(), token_RJ.long(), self.parent[slot_R], self.levels)


class Moves(NamedTuple):
    """Where the accepted paths go, ``[R * P]`` each.

    Attributes:
        source: Rows of logits.
        place: The rows whose place they take; the same row where nothing moves.
        is_draft: Whether it is an accepted draft token.
    """

    source: torch.Tensor
    place: torch.Tensor
    is_draft: torch.Tensor


class TreeRound:
    """One batch whose requests may have drafts to be verified.

    Args:
        table: All trees.
        slot: int64 ``[R]``; the requests' slots in the table.
        start: int64 ``[R]``; each request's first row of logits.
        count: int64 ``[R]``; its drafts.
        token_index: int64 ``[S]``; the token of the batch behind each row of logits.
        num_tokens: T.
    """

    def __init__(
        self,
        table: TreeTable,
        slot: torch.Tensor,
        start: torch.Tensor,
        count: torch.Tensor,
        token_index: torch.Tensor,
        num_tokens: int,
    ) -> None:
        self.table, self.num_tokens, self.token_index = table, num_tokens, token_index
        self.slot, self.start, self.count = slot, start, count
        num_rows = token_index.shape[0]
        requests_R = torch.arange(slot.shape[0], device=slot.device)
        self.owner = torch.repeat_interleave(requests_R, count + 1, output_size=num_rows)
        node_S = torch.arange(num_rows, device=slot.device) - start[self.owner]
        slot_S = slot[self.owner]
        self.depth = table.depth[slot_S, node_S]
        self.path = table.path[slot_S, node_S]
        # Positions of vLLM count tokens; those of nodes count levels.
        self.position_shift = self.depth - node_S

    def walk(self, sampled_S: torch.Tensor, token_S: torch.Tensor) -> Walk:
        """Walk down all trees; see `TreeTable.walk`."""
        return self.table.walk(self.slot, self.start, self.count, sampled_S, token_S)

    def moves(self, found: Walk) -> Moves:
        """Return how to bring each accepted path to the front of its request's rows."""
        return find_moves(self.start, self.count, found)


def find_moves(start_R: torch.Tensor, count_R: torch.Tensor, found: Walk) -> Moves:
    """Return how to bring accepted paths to the front; arguments as those of `TreeRound`."""
    places_P = torch.arange(found.path.shape[1], device=found.path.device)
    is_draft_RP = (places_P > 0) & (places_P <= found.accepted.unsqueeze(1))
    source_RP = _rows(start_R, count_R, found.path)
    return Moves(
        source_RP.flatten(), _rows(start_R, count_R, places_P).flatten(), is_draft_RP.flatten()
    )


def _rows(start_R: torch.Tensor, count_R: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return rows of logits ``[R, X]`` by place; a request's last one where it has fewer."""
    return start_R.unsqueeze(1) + torch.minimum(places, count_R.unsqueeze(1))
