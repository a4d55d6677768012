"""Drafting trees on the V2 model runner.

Shapes: R requests, W nodes expanded in a pass, B = R * W rows of a pass, D hidden size, V
vocabulary.
"""

from typing import Any

import torch
from torch import nn
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_vispec.engine.trees.attention import settings_of
from vllm_vispec.engine.trees.setting import schedules_chains
from vllm_vispec.engine.trees.v2_state import StateTrees
from vllm_vispec.engine.v2 import ViSpecSpeculator
from vllm_vispec.tree.grow import DraftTree, Frontier, TreeGrower, best_path, replace_rows

_NO_SLOT = -1


class TreeSpeculator(ViSpecSpeculator):
    """Runs vLLM's first pass for one draft, then one pass for each level of the trees."""

    trees: StateTrees

    def load_model(self, target_model: nn.Module) -> None:
        """Load the head."""
        super().load_model(target_model)
        self._settings = settings_of(self.vllm_config)
        self._grower = TreeGrower(self._settings)
        self._schedules_chains = schedules_chains(self.vllm_config, self._settings)
        # Of the drafts' own width, whatever the next pass reads of it; recorded graphs write here.
        shape = self.max_num_reqs, self.hidden_size
        self._root_hidden = torch.zeros(shape, dtype=self.dtype, device=self.device)

    def set_attn(self, model_state: Any, *args: Any, **kwargs: Any) -> None:
        """Find the trees that the target is verified with."""
        super().set_attn(model_state, *args, **kwargs)
        self.trees = model_state.vispec_trees

    def capture(self) -> None:
        """Record the first pass, and a chain's steps; the levels of trees run eagerly."""
        if self._schedules_chains:
            super().capture()
            return
        num_steps = self.speculative_config.num_speculative_tokens
        self.num_speculative_steps = 1
        try:
            super().capture()
        finally:
            self.num_speculative_steps = num_steps

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        *args: Any,
        num_speculative_tokens: int | None = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the trees' tokens ``[R, N]``, best nodes first.

        No more of them than a path has are drafted as vLLM drafts a chain, at a chain's cost.
        """
        self.trees.accept(input_batch.input_ids, last_hidden_states, slot_mappings)
        count = (
            self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        )
        is_chain = count <= self._settings.levels
        drafts = super().propose(
            input_batch,
            attn_metadata,
            slot_mappings,
            last_hidden_states,
            *args,
            num_speculative_tokens=count if is_chain else 1,
            dummy_run=dummy_run,
            skip_attn_for_dummy_run=skip_attn_for_dummy_run,
            **kwargs,
        )
        if dummy_run:
            return drafts
        if is_chain:
            self.trees.write_chains(input_batch.idx_mapping)
            return drafts
        tree = self._grow(input_batch)
        chain_rows = self.trees.chain_rows(input_batch.req_ids)
        if chain_rows is not None:
            tree = replace_rows(tree, best_path(tree), chain_rows)
        self.trees.write(input_batch.idx_mapping, tree)
        # Drafts are embedded as they are: the table knows which places are empty.
        drafts.copy_(tree.token.clamp(min=0))
        return drafts

    def sample_draft(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keep the roots' hidden states ``[R, D]``; return no token, a tree begins with many.

        A recorded first pass serves trees and chains, so it draws where there may be chains.
        """
        self._root_hidden[: hidden_states.shape[0]] = hidden_states
        if self._schedules_chains:
            return super().sample_draft(hidden_states, *args, **kwargs)
        return hidden_states.new_zeros(hidden_states.shape[0], dtype=torch.int64)

    def _grow(self, input_batch: InputBatch) -> DraftTree:
        num_requests = input_batch.num_reqs
        hidden_RXD = self._root_hidden[:num_requests].unsqueeze(1)
        root_R = self.input_buffers.positions[:num_requests].clone()
        frontier = self._grower.start(self.model.compute_logits(hidden_RXD[:, 0]))
        width = frontier.token.shape[1]
        requests_R = torch.arange(num_requests, device=root_R.device)
        self.draft_rows.move(requests_R.repeat_interleave(width))
        bound_R = input_batch.seq_lens_cpu_upper_bound
        behind = self._settings.draft_slots
        longest = int(bound_R[:num_requests].max()) + behind
        self.draft_max_seq_len = min(longest, self.max_model_len)
        for level in range(1, self._settings.depth + 1):
            index_RWD = frontier.parent_row.unsqueeze(-1).expand(-1, -1, hidden_RXD.shape[-1])
            hidden_RWD = hidden_RXD.gather(1, index_RWD)
            hidden_BD = self._level(level, frontier, hidden_RWD, root_R, bound_R)
            hidden_RXD = hidden_BD.view(num_requests, width, -1)
            logits_BV = self.model.compute_logits(hidden_BD)
            frontier = self._grower.expand(logits_BV.view(num_requests, width, -1))
        self.trees.codes.clear()
        return self._grower.finish(self.num_speculative_steps)

    def _level(
        self,
        level: int,
        frontier: Frontier,
        hidden_RWD: torch.Tensor,
        root_R: torch.Tensor,
        bound_R: torch.Tensor,
    ) -> torch.Tensor:
        """Run the draft over one level's nodes; return their hidden states ``[B, D]``."""
        num_requests, width = frontier.token.shape
        num_rows, buffers = num_requests * width, self.input_buffers
        last = self.max_model_len - 1
        buffers.input_ids[:num_rows] = frontier.token.flatten()
        positions_R1 = (root_R + level).clamp(max=last).unsqueeze(1)
        buffers.positions[:num_rows] = positions_R1.expand(-1, width).flatten()
        # Logits need all of a state, the next pass what the draft reads of it.
        width_read = self.hidden_states.shape[1]
        self.hidden_states[:num_rows] = hidden_RWD.flatten(0, 1)[:, :width_read]
        starts = torch.arange(0, num_rows + 1, width, device=root_R.device)
        buffers.query_start_loc[: num_requests + 1] = starts
        buffers.seq_lens[:num_requests] = (root_R + 1 + level * width).clamp(max=last + 1)
        self.trees.codes.set_draft(frontier.path.flatten(0, 1))
        slot_mappings = self._level_slots(level, width, root_R)
        metadata = self._build_uniform_attn_metadata(
            batch_desc=BatchExecutionDescriptor(CUDAGraphMode.NONE, num_rows, None),
            num_reqs=num_requests,
            num_query_per_req=width,
            seq_lens_cpu_upper_bound=bound_R,
            step=level * width,
        )
        hidden, _ = self._run_model(num_rows, metadata, slot_mappings, None)
        return hidden[:num_rows]

    def _level_slots(self, level: int, width: int, root_R: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the KV slots ``[B]`` of one level's nodes; none beyond the longest sequence."""
        num_requests = root_R.shape[0]
        first_R1 = root_R.unsqueeze(1) + 1 + (level - 1) * width
        place_B = (first_R1 + torch.arange(width, device=root_R.device)).flatten()
        slots = self.block_tables.compute_slot_mappings(
            self.idx_mapping[:num_requests],
            self.input_buffers.query_start_loc[: num_requests + 1],
            place_B.clamp(max=self.max_model_len - 1),
            place_B.shape[0],
        )
        slots.masked_fill_(place_B >= self.max_model_len, _NO_SLOT)
        return build_slot_mappings_by_layer(slots, self.kv_cache_config)
