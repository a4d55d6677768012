"""Trees on the V2 model runner: positions and codes before the pass, the accepted path after it.

Shapes: R requests of a batch, S rows of logits, T tokens of a batch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_vispec.compat.patching import patch
from vllm_vispec.trees.attention import code_rows, settings_of
from vllm_vispec.trees.grow import best_path, replace_rows
from vllm_vispec.trees.memory import find_target_cache
from vllm_vispec.trees.path_rules import needs_chain
from vllm_vispec.trees.rejection_sampler import TreeRejectionSampler
from vllm_vispec.trees.rounds import Moves, TreeRound, TreeTable
from vllm_vispec.trees.setting import has_branches
from vllm_vispec.trees.walk import Walk
from vllm_vispec.trees.walk_graph import StaticWalk


def custom_sampler(original: Callable[..., Any], state: Any, sampler: Any) -> Any:
    """Stands for ``ModelState.custom_sampler``; engines without trees get vLLM's samplers."""
    found = original(state, sampler)
    if found is not None or not has_branches(state.vllm_config):
        return found
    tree_sampler = TreeRejectionSampler(sampler, state.vllm_config.speculative_config, state.device)
    tree_sampler.trees = state.vispec_trees = StateTrees(state)
    return sampler, tree_sampler


class StateTrees:
    """The trees of one V2 runner, tied to its model state; changes that one object.

    Args:
        state: vLLM's ``ModelState``; target and draft are loaded.
    """

    def __init__(self, state: Any) -> None:
        config = state.vllm_config
        self.codes = code_rows(config)
        num_nodes = config.speculative_config.num_speculative_tokens
        self.table = TreeTable(settings_of(config), num_nodes, state.max_num_reqs, state.device)
        self.codes.table = self.table
        max_num_tokens = config.scheduler_config.max_num_batched_tokens
        self.static_walk = StaticWalk(self.table, state.max_num_reqs, max_num_tokens)
        layers = config.compilation_config.static_forward_context
        self.cache = find_target_cache(
            config, [name for name in layers if getattr(layers[name], "is_draft_layer", False)]
        )
        self._device = state.device
        self._needs_chain: dict[str, bool] = {}
        self._round: TreeRound | None = None
        self._positions: torch.Tensor | None = None
        self._moves: list[tuple[torch.Tensor, Moves]] = []
        patch(state, "prepare_inputs", self._begin_pass)
        patch(state, "add_request", self._add_request)
        patch(state, "remove_request", self._remove_request)

    def write_chains(self, slots: torch.Tensor) -> None:
        """Let the drafts of requests be plain rows, by vLLM's slots, int64 ``[R]``."""
        self.table.write_chains(slots.long())

    def replace_with_chains(
        self, request_ids: list[str], slots: torch.Tensor, token: torch.Tensor
    ) -> None:
        """Give requests that cannot have a tree the best line of theirs.

        Args:
            request_ids: The batch.
            slots: Integers ``[R]``; vLLM's request slots.
            token: int64 ``[R, N]``; the drafts; changed in place.
        """
        flags = [self._needs_chain.get(request_id, False) for request_id in request_ids]
        if not any(flags):
            return
        rows_R1 = async_tensor_h2d(flags, self._device).unsqueeze(1)
        tree = self.table.read(slots.long(), token)
        tree = replace_rows(tree, best_path(tree), rows_R1)
        self.table.write(slots.long(), tree)
        token.copy_(tree.token.clamp(min=0))

    def end_pass(self) -> None:
        """Let positions count tokens again, as samplers and the draft read them."""
        if self._round is not None and self._positions is not None:
            self._shift(self._round, self._positions, -1)
        self._positions = None

    def part(
        self, first_row: int, num_rows: int, slot: torch.Tensor, starts: torch.Tensor
    ) -> TreeRound:
        """Return some requests of the batch; vLLM takes large ones apart.

        Args:
            first_row: Their first row of logits.
            num_rows: Their rows of logits.
            slot: int64 ``[R]``; their slots.
            starts: ``[R + 1]``; their first rows and the end, from 0.
        """
        assert self._round is not None
        if num_rows == len(self._round.token_index):
            return self._round
        token_S = self._round.token_index[first_row : first_row + num_rows]
        return _round(self.table, slot, starts, token_S, self._round.num_tokens)

    def walk(
        self, batch: TreeRound, sampled_S: torch.Tensor, token_S: torch.Tensor
    ) -> tuple[Walk, Moves]:
        """Walk down the trees of a batch or, where vLLM took it apart, of some of its requests."""
        if batch is self._round:
            return self.static_walk.walk(batch, sampled_S, token_S)
        found = batch.walk(sampled_S, token_S)
        return found, batch.moves(found)

    def note(self, batch: TreeRound, moves: Moves) -> None:
        """Remember accepted paths until the draft's turn."""
        self._moves.append((batch.token_index, moves))

    def accept(
        self, input_ids: torch.Tensor, hidden: torch.Tensor, slots: Mapping[str, torch.Tensor]
    ) -> None:
        """Move the accepted paths to the front: tokens, hidden states, keys and values."""
        self.codes.clear()
        for token_S, moves in self._moves:
            source_A, place_A = token_S[moves.source], token_S[moves.place]
            for rows in (input_ids, hidden):
                rows[place_A] = rows[source_A]
            self.cache.move(slots, source_A, place_A, moves.is_draft)
        self._moves = []

    def _begin_pass(
        self, original: Callable[..., dict[str, Any]], input_batch: Any, req_states: Any
    ) -> dict[str, Any]:
        """Give nodes the positions of their levels and the codes of their paths."""
        inputs = original(input_batch, req_states)
        self._round, self._moves = None, []
        if not input_batch.num_draft_tokens:
            self.codes.clear()
            return inputs
        token_S = input_batch.logits_indices.long()
        slot_R, starts = input_batch.idx_mapping, input_batch.cu_num_logits
        self._round = _round(self.table, slot_R, starts, token_S, input_batch.num_tokens)
        # In place: recorded graphs read this memory.
        self._positions = inputs.get("positions", input_batch.positions)
        self._shift(self._round, self._positions, 1)
        self.codes.set(token_S, self._round.path, self._round.num_tokens)
        return inputs

    def _shift(self, batch: TreeRound, positions: torch.Tensor, sign: int) -> None:
        shift_S = batch.position_shift.to(positions.dtype).expand(*positions.shape[:-1], -1)
        positions.index_add_(-1, batch.token_index, shift_S, alpha=sign)

    def _add_request(self, original: Callable[..., None], slot: int, request: Any) -> None:
        original(slot, request)
        self._needs_chain[request.req_id] = needs_chain(request.sampling_params)

    def _remove_request(self, original: Callable[..., None], request_id: str) -> None:
        self._needs_chain.pop(request_id, None)
        original(request_id)


def _round(
    table: TreeTable, slot: torch.Tensor, starts: torch.Tensor, token_S: torch.Tensor, num: int
) -> TreeRound:
    starts = starts.long()
    count_R = starts.diff() - 1
    return TreeRound(table, slot.long(), starts[:-1], count_R, token_S, num)
