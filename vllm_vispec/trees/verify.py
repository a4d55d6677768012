"""Verification: which path of each request's tree the target accepts, and where its rows go.

At every node the target's token is sampled as plain decoding would sample it behind that path.  If
a child holds that token, the path goes on there; else the token is emitted as the bonus token and
the path ends.  The output is distributed as plain decoding's, for any tree that was grown without
looking at the samples.

Shapes: R requests of a batch, S rows of logits (every request's last token and its drafts), T
tokens of a batch, N nodes, J = N + 1 nodes with the root first, L levels, P = L + 1.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from vllm_vispec.trees.codes import UNUSED, CodeBuffers
from vllm_vispec.trees.grow import NO_TOKEN, DraftTree, best_path, replace_rows
from vllm_vispec.trees.target_cache import TargetCache

# vLLM's request slot of the rows that pad a recorded batch.
NO_REQUEST = -1


class Verification(NamedTuple):
    """The accepted paths of a batch.

    Attributes:
        path: int64 ``[R, P]``; the nodes on the path, the root first.  Behind its end, each entry
            is its own place, so that moving ``path[i]`` to place ``i`` leaves those rows as they
            are.
        num_accepted: int64 ``[R]``; draft tokens accepted.
        token: int64 ``[R, P]``; the tokens emitted, the bonus token last, then -1.
    """

    path: torch.Tensor
    num_accepted: torch.Tensor
    token: torch.Tensor


def verify_trees(
    sampled: torch.Tensor, token: torch.Tensor, parent: torch.Tensor, levels: int
) -> Verification:
    """Find the accepted path of each tree.

    A node is on the path if the target sampled its token at its parent, and its parent is on the
    path.  All nodes are looked at at once: pointer doubling joins each node's own condition with
    those of its ancestors, twice as far up every time, so the number of kernels does not grow with
    the number of nodes and nothing is read back to the host.

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
    is_on_path_RJ = is_root_J | ((token >= 0) & (token == sampled.gather(1, parent)))
    above_RJ = parent
    for doubling in range((levels - 1).bit_length()):
        if doubling:
            above_RJ = above_RJ.gather(1, above_RJ)
        is_on_path_RJ = is_on_path_RJ & is_on_path_RJ.gather(1, above_RJ)
    # Parents come before children: in a row's order the nodes on the path are the path.
    place_RJ = torch.where(is_on_path_RJ, places_J, num_nodes)
    place_RP = place_RJ.topk(levels + 1, dim=1, largest=False, sorted=True).values
    is_on_RP = place_RP < num_nodes
    path_RP = torch.where(is_on_RP, place_RP, places_J[: levels + 1])
    token_RP = torch.where(is_on_RP, sampled.gather(1, path_RP), -1)
    return Verification(path_RP, is_on_RP.sum(1) - 1, token_RP)


class Moves(NamedTuple):
    """Where the rows of accepted paths go, ``[R * P]`` each.

    Attributes:
        source: Rows of logits.
        place: The rows whose place they take; the same row where nothing moves.
        is_draft: Whether it is an accepted draft token.
    """

    source: torch.Tensor
    place: torch.Tensor
    is_draft: torch.Tensor


class TreeTable(nn.Module):
    """The shape of each request's tree, by request slot; the tokens travel with vLLM's drafts.

    The slot `no_tree`, behind all others, holds a chain: node i is the child of node i - 1.  What
    is written to `NO_REQUEST` belongs to nobody.

    It is a module because a sleeping engine keeps the buffers of its models and nothing else.

    Args:
        levels: L.
        num_nodes: N.
        num_slots: Most requests at once.
        device: Where it lies.
    """

    def __init__(self, levels: int, num_nodes: int, num_slots: int, device: torch.device) -> None:
        super().__init__()
        self.levels, self.num_nodes, self.no_tree = levels, num_nodes, num_slots
        depth_J = torch.arange(num_nodes + 1, device=device)
        rows = {
            "depth": depth_J,
            "parent": (depth_J - 1).clamp_(min=0),
            # A chain is accepted as far as trees are deep, and no further.
            "is_node": (depth_J > 0) & (depth_J <= levels),
            "path": torch.full((num_nodes + 1, levels), UNUSED, device=device),
        }
        for name, row in rows.items():
            # One more for `no_tree`, and the last one for `NO_REQUEST`.
            table = row.repeat(num_slots + 2, *(1 for _ in row.shape))
            self.register_buffer(name, table, persistent=False)
        self.depth: torch.Tensor
        self.parent: torch.Tensor
        self.is_node: torch.Tensor
        self.path: torch.Tensor

    def write_trees(self, slots: slice | torch.Tensor, tree: DraftTree) -> None:
        """Keep the trees of a batch; the root comes before them and never changes."""
        self.depth[slots, 1:] = tree.depth
        self.parent[slots, 1:] = tree.parent
        self.is_node[slots, 1:] = tree.token != NO_TOKEN
        self.path[slots, 1:] = tree.path

    def read_trees(self, slots: torch.Tensor, token: torch.Tensor) -> DraftTree:
        """Return the trees of a batch, whose drafts are ``token`` ``[R, N]``."""
        is_node_RN = self.is_node[slots, 1:]
        return DraftTree(
            token.masked_fill(~is_node_RN, NO_TOKEN),
            self.parent[slots, 1:],
            self.depth[slots, 1:],
            self.path[slots, 1:],
        )

    def write_chains(self, slots: torch.Tensor, length: torch.Tensor | None = None) -> None:
        """Let the drafts of a batch be chains; with ``length``, int64 ``[R]``, up to their ends."""
        for rows in (self.depth, self.parent, self.is_node, self.path):
            rows[slots] = rows[self.no_tree].clone()
        if length is not None:
            self.is_node[slots] &= self.depth[slots] <= length.unsqueeze(1)

    def verify(
        self,
        slot_R: torch.Tensor,
        start_R: torch.Tensor,
        count_R: torch.Tensor,
        sampled_S: torch.Tensor,
        token_S: torch.Tensor,
    ) -> tuple[Verification, Moves]:
        """Find the accepted paths of a batch, and how to bring them to the front.

        Args:
            slot_R: The requests' slots.
            start_R: Their first rows of logits.
            count_R: Their drafts.
            sampled_S: The target's token behind each row.
            token_S: Each row's own draft token; the roots' do not matter.
        """
        places_J = torch.arange(self.num_nodes + 1, device=sampled_S.device)
        is_node_RJ = self.is_node[slot_R] & (places_J <= count_R.unsqueeze(1))
        row_RJ = _rows(start_R, count_R, places_J)
        token_RJ = token_S[row_RJ].masked_fill(~is_node_RJ, NO_TOKEN)
        parent_RJ = self.parent[slot_R]
        found = verify_trees(sampled_S[row_RJ].long(), token_RJ.long(), parent_RJ, self.levels)
        places_P = places_J[: self.levels + 1]
        is_draft_RP = (places_P > 0) & (places_P <= found.num_accepted.unsqueeze(1))
        source_RP = _rows(start_R, count_R, found.path)
        place_RP = row_RJ[:, : self.levels + 1]
        return found, Moves(source_RP.flatten(), place_RP.flatten(), is_draft_RP.flatten())


class TreeBatch:
    """One batch whose requests may have drafts to be verified.

    Args:
        table: All trees.
        slot: Integers ``[R]``; the requests' slots in the table.
        starts: Integers ``[R + 1]``; each request's first row of logits, and the end.
        token_index: int64 ``[S]``; the token of the batch behind each row of logits.
        num_tokens: T.

    Attributes:
        start, count: int64 ``[R]``; each request's first row of logits, and its drafts.
        owner: int64 ``[S]``; the request of each row.
        depth, path: ``[S]`` and ``[S, L]``; of each row's node.
        position_shift: ``[S]``; what to add to vLLM's positions, which count tokens, so that they
            count levels.
    """

    def __init__(
        self,
        table: TreeTable,
        slot: torch.Tensor,
        starts: torch.Tensor,
        token_index: torch.Tensor,
        num_tokens: int,
    ) -> None:
        self.table, self.num_tokens, self.token_index = table, num_tokens, token_index
        starts, num_rows = starts.long(), token_index.shape[0]
        self.slot, self.start, self.count = slot.long(), starts[:-1], starts.diff() - 1
        requests_R = torch.arange(slot.shape[0], device=slot.device)
        self.owner = torch.repeat_interleave(requests_R, self.count + 1, output_size=num_rows)
        node_S = torch.arange(num_rows, device=slot.device) - self.start[self.owner]
        slot_S = self.slot[self.owner]
        self.depth = table.depth[slot_S, node_S]
        self.path = table.path[slot_S, node_S]
        self.position_shift = self.depth - node_S

    def shift_positions(self, positions: torch.Tensor, sign: int) -> None:
        """Let positions ``[..., T]`` count levels (sign 1), or tokens again (-1), in place.

        In place because recorded graphs of the target read this memory.
        """
        shift_S = self.position_shift.to(positions.dtype).expand(*positions.shape[:-1], -1)
        positions.index_add_(-1, self.token_index, shift_S, alpha=sign)

    def verify(self, sampled_S: torch.Tensor, token_S: torch.Tensor) -> tuple[Verification, Moves]:
        """Find the accepted paths and where their rows go; see `TreeTable.verify`."""
        return self.table.verify(self.slot, self.start, self.count, sampled_S, token_S)


class EngineTrees:
    """The trees of one engine, from their growth to the draft step that follows their verification.

    Args:
        codes: What its attention layers read.
        table: The trees' shapes.
        cache: The KV cache of the target's layers.

    Attributes:
        batch: What the target verifies in this step; None if no request has drafts.
    """

    def __init__(self, codes: CodeBuffers, table: TreeTable, cache: TargetCache) -> None:
        self.codes, self.table, self.cache = codes, table, cache
        # A module of the target, through its codes: its buffers survive an engine's sleep.
        codes.table = table
        self.batch: TreeBatch | None = None
        self._positions: torch.Tensor | None = None
        self._moves: list[tuple[torch.Tensor, Moves]] = []

    def begin_target_pass(self, batch: TreeBatch | None, positions: torch.Tensor) -> None:
        """Give nodes the positions of their levels and the codes of their paths.

        Args:
            batch: The batch; None if no request has drafts.
            positions: ``[..., T]``; changed in place until `end_target_pass`.
        """
        self.batch, self._moves = batch, []
        if batch is None:
            self.codes.clear_codes()
            return
        self._positions = positions
        batch.shift_positions(positions, 1)
        self.codes.write_target_codes(batch.token_index, batch.path, batch.num_tokens)

    def end_target_pass(self) -> None:
        """Let positions count tokens again, as samplers and the draft read them."""
        if self.batch is not None and self._positions is not None:
            self.batch.shift_positions(self._positions, -1)
        self._positions = None

    def batch_part(
        self, first_row: int, num_rows: int, slot: torch.Tensor, starts: torch.Tensor
    ) -> TreeBatch:
        """Return some requests of the batch; vLLM verifies large ones in parts.

        Args:
            first_row: Their first row of logits.
            num_rows: Their rows of logits.
            slot: Integers ``[R]``; their slots.
            starts: ``[R + 1]``; their first rows and the end, from 0.
        """
        assert self.batch is not None
        if num_rows == len(self.batch.token_index):
            return self.batch
        token_S = self.batch.token_index[first_row : first_row + num_rows]
        return TreeBatch(self.table, slot, starts, token_S, self.batch.num_tokens)

    def note_accepted(self, batch: TreeBatch, moves: Moves) -> None:
        """Remember accepted paths until they are moved."""
        self._moves.append((batch.token_index, moves))

    def move_accepted(
        self, input_ids: torch.Tensor, hidden: torch.Tensor, slots: Mapping[str, torch.Tensor]
    ) -> None:
        """Move the accepted paths to the front: tokens, hidden states, keys and values.

        All that follows, the draft's first pass and the next step, then finds what it would find
        had the accepted tokens been a chain.
        """
        self.codes.clear_codes()
        for token_S, moves in self._moves:
            source_A, place_A = token_S[moves.source], token_S[moves.place]
            for rows in (input_ids, hidden):
                rows[place_A] = rows[source_A]
            self.cache.move(slots, source_A, place_A, moves.is_draft)
        self._moves = []

    def replace_with_chains(
        self, is_linear: torch.Tensor, slots: torch.Tensor, token: torch.Tensor
    ) -> None:
        """Give some requests the best line of their trees.

        Args:
            is_linear: bool ``[R, 1]``; which requests of the batch cannot have a tree.
            slots: int64 ``[R]``; the requests' slots.
            token: int64 ``[R, N]``; the drafts; changed in place.
        """
        tree = self.table.read_trees(slots, token)
        tree = replace_rows(tree, best_path(tree), is_linear)
        self.table.write_trees(slots, tree)
        token.copy_(tree.token.clamp(min=0))


def _rows(start_R: torch.Tensor, count_R: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return rows of logits ``[R, X]`` by place; a request's last one where it has fewer."""
    return start_R.unsqueeze(1) + torch.minimum(places, count_R.unsqueeze(1))
