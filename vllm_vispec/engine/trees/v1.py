"""Drafting trees on the V1 model runner.

Shapes: R requests, W nodes expanded in a pass, B = R * W rows of a pass, D hidden size, V
vocabulary.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.forward_context import set_forward_context

from vllm_vispec.engine.trees.attention import settings_of
from vllm_vispec.engine.trees.limits import check_engine
from vllm_vispec.engine.trees.v1_runner import RunnerTrees
from vllm_vispec.engine.v1 import ViSpecProposer
from vllm_vispec.tree.grow import DraftTree, Frontier, TreeGrower, best_path, replace_rows

_NO_SLOT = -1


class _Roots(NamedTuple):
    """Where the trees of a batch begin.

    Attributes:
        position: int64 ``[R]``; of each request's last row in the first pass.
        metadata: vLLM's description of the batch.
    """

    position: torch.Tensor
    metadata: Any


class TreeProposer(ViSpecProposer):
    """Runs vLLM's first pass for one draft, then one pass for each level of the trees."""

    trees: RunnerTrees

    def load_model(self, target_model: nn.Module) -> None:
        """Load the head; everything trees need is allocated before memory is profiled."""
        super().load_model(target_model)
        self._settings = settings_of(self.vllm_config)
        check_engine(self.vllm_config, self._settings)
        self._grower = TreeGrower(self._settings)
        self._num_nodes = self.speculative_config.num_speculative_tokens
        self._root_hidden: torch.Tensor | None = None
        self._grows = True
        self.trees = RunnerTrees(self._runner, self._draft_attn_layer_names)

    def propose(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the trees' tokens ``[R, num_speculative_tokens]``, best nodes first.

        No more of them than a path has are drafted as vLLM drafts a chain, at a chain's cost.
        """
        self.trees.codes.clear()
        self._grows = num_speculative_tokens > self._settings.levels
        if not self._grows:
            self.trees.write_chains()
            return super().propose(num_speculative_tokens, *args, **kwargs)
        super().propose(1, *args, **kwargs)
        self.num_speculative_tokens = num_speculative_tokens
        tree = self._grow(kwargs["common_attn_metadata"])
        chain_rows = self.trees.chain_rows()
        if chain_rows is not None:
            tree = replace_rows(tree, best_path(tree), chain_rows)
        self.trees.write(tree)
        return tree.token[:, :num_speculative_tokens].contiguous()

    def _sample_draft_tokens(
        self, hidden_states: torch.Tensor, sampling_metadata: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keep the roots' hidden states ``[R, D]``; a tree has no single draft token."""
        if not self._grows:
            return super()._sample_draft_tokens(hidden_states, sampling_metadata)
        self._root_hidden = hidden_states
        return hidden_states.new_zeros(hidden_states.shape[0], dtype=torch.int64), None

    def _grow(self, metadata: Any) -> DraftTree:
        hidden_RD, rows_R = self._root_hidden, self._first_draft_rows
        assert hidden_RD is not None
        assert rows_R is not None
        self._root_hidden = self._first_draft_rows = None
        roots = _Roots(self.positions[rows_R], metadata)
        frontier = self._grower.start(self.model.compute_logits(hidden_RD))
        num_requests, width = frontier.token.shape
        self.draft_rows.gather(rows_R.repeat_interleave(width))
        hidden_RXD = hidden_RD.unsqueeze(1)
        for level in range(1, self._settings.depth + 1):
            index_RWD = frontier.parent_row.unsqueeze(-1).expand(-1, -1, hidden_RXD.shape[-1])
            hidden_BD = self._level(level, frontier, hidden_RXD.gather(1, index_RWD), roots)
            hidden_RXD = hidden_BD.view(num_requests, width, -1)
            logits_BV = self.model.compute_logits(hidden_BD)
            frontier = self._grower.expand(logits_BV.view(num_requests, width, -1))
        self.trees.codes.clear()
        return self._grower.finish(self._num_nodes)

    def _level(
        self, level: int, frontier: Frontier, hidden_RWD: torch.Tensor, roots: _Roots
    ) -> torch.Tensor:
        """Run the draft over one level's nodes; return their hidden states ``[B, D]``."""
        num_rows = frontier.token.numel()
        width = frontier.token.shape[1]
        positions_R1 = (roots.position + level).unsqueeze(1).clamp(max=self.max_model_len - 1)
        self.input_ids[:num_rows] = frontier.token.flatten()
        self.positions[:num_rows] = positions_R1.expand(-1, width).flatten()
        # Logits need all of a state, the next pass what the draft reads of it.
        width_read = self.hidden_states.shape[1]
        self.hidden_states[:num_rows] = hidden_RWD.flatten(0, 1)[:, :width_read]
        rows_B = torch.arange(num_rows, device=frontier.path.device)
        self.trees.codes.set(rows_B, frontier.path.flatten(0, 1), num_rows)
        metadata = self._level_metadata(level, width, roots)
        _, per_layer = self.build_per_group_and_layer_attn_metadata(metadata, draft_index=level)
        mode, num_input, across_dp = self._determine_batch_execution_and_padding(num_rows)
        model_kwargs, num_slots = self.build_model_inputs_first_pass(num_rows, num_input, None)
        with set_forward_context(
            per_layer,
            self.vllm_config,
            num_tokens=num_input,
            num_tokens_across_dp=across_dp,
            cudagraph_runtime_mode=mode,
            slot_mapping=self._get_slot_mapping(num_slots, metadata.slot_mapping),
        ):
            hidden, _ = self.model(**model_kwargs)
        return hidden[:num_rows]

    def _level_metadata(self, level: int, width: int, roots: _Roots) -> Any:
        """Describe one level's nodes as the next ``width`` tokens of each request."""
        batch, behind = roots.metadata, level * width
        num_requests, num_rows = roots.position.shape[0], roots.position.shape[0] * width
        starts = torch.arange(0, num_rows + 1, width, dtype=torch.int32)
        seq_lens = (roots.position + 1 + behind).clamp(max=self.max_model_len)
        upper = batch.seq_lens_cpu_upper_bound
        return replace(
            batch,
            query_start_loc=self.arange[: num_requests + 1] * width,
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.to(batch.seq_lens.dtype),
            num_actual_tokens=num_rows,
            max_query_len=width,
            max_seq_len=min(batch.max_seq_len + behind, self.max_model_len),
            seq_lens_cpu_upper_bound=None if upper is None else upper + behind,
            slot_mapping=self._level_slots(level, width, roots),
        )

    def _level_slots(self, level: int, width: int, roots: _Roots) -> torch.Tensor:
        """Return the KV slots ``[B]`` of one level's nodes; none beyond the longest sequence."""
        table = roots.metadata.block_table_tensor
        first_R1 = roots.position.unsqueeze(1) + 1 + (level - 1) * width
        place_RW = first_R1 + torch.arange(width, device=table.device)
        block_RW = (place_RW // self.block_size).clamp(max=table.shape[1] - 1)
        slot_RW = table.gather(1, block_RW).long() * self.block_size + place_RW % self.block_size
        return slot_RW.masked_fill(place_RW >= self.max_model_len, _NO_SLOT).flatten()
