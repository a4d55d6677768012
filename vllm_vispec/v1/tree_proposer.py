"""Drafting trees on the V1 model runner.

Shapes: R requests, W nodes expanded in a pass, B = R * W rows of a pass, D hidden size, V
vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform

from vllm_vispec.trees.attention import settings_of
from vllm_vispec.trees.grow import (
    DraftTree,
    Frontier,
    PathGrower,
    TreeGrower,
    best_path,
    replace_rows,
)
from vllm_vispec.trees.parts import parts_of, spread_rows
from vllm_vispec.trees.setting import has_branches, has_paths
from vllm_vispec.v1.proposer import ViSpecProposer
from vllm_vispec.v1.tree_runner import RunnerChains, RunnerTrees

_NO_SLOT = -1


class _Passes(NamedTuple):
    """What the passes over the levels of a round's trees are told, all made at once.

    Attributes:
        batch: vLLM's description of the batch.
        width: W.
        positions: int64 ``[levels, B]``.
        slots: int64 ``[levels, B]``; KV slots, none beyond the longest sequence.
        seq_lens: ``[levels, R]``.
        starts, starts_cpu: ``[R + 1]``; first row of each request.
    """

    batch: Any
    width: int
    positions: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    starts: torch.Tensor
    starts_cpu: torch.Tensor

    def metadata(self, level: int, max_model_len: int) -> Any:
        """Describe one level's nodes as the next ``width`` tokens of each request."""
        batch, behind = self.batch, level * self.width
        upper = batch.seq_lens_cpu_upper_bound
        return replace(
            batch,
            query_start_loc=self.starts,
            query_start_loc_cpu=self.starts_cpu,
            seq_lens=self.seq_lens[level - 1],
            num_actual_tokens=self.positions.shape[1],
            max_query_len=self.width,
            max_seq_len=min(batch.max_seq_len + behind, max_model_len),
            seq_lens_cpu_upper_bound=None if upper is None else upper + behind,
            slot_mapping=self.slots[level - 1],
        )


class TreeProposer(ViSpecProposer):
    """Runs vLLM's first pass for one draft, then one pass for each level of the trees."""

    trees: RunnerChains

    def load_model(self, target_model: nn.Module) -> None:
        """Load the head; everything trees need is allocated before memory is profiled."""
        super().load_model(target_model)
        self._settings = settings_of(self.vllm_config)
        self._tree_grower = TreeGrower(self._settings)
        self._path_grower = self._make_path_grower()
        self._num_nodes = self.speculative_config.num_speculative_tokens
        self._root_hidden: torch.Tensor | None = None
        self._grows = True
        self._on_cpu = current_platform.is_cpu()
        self.trees = self._attach()

    def _make_path_grower(self) -> PathGrower | None:
        """Return what grows single paths; None where vLLM's chains do."""
        # With asynchronous scheduling drafts stay on the device, which the log said at start.
        if not has_paths(self.vllm_config) or self._runner.use_async_scheduling:
            return None
        return PathGrower(self._settings.one_branch())

    def _attach(self) -> RunnerChains:
        if has_branches(self.vllm_config):
            return RunnerTrees(self._runner, self._draft_attn_layer_names)
        return RunnerChains(self._runner)

    def propose(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the trees' tokens ``[R, num_speculative_tokens]``, best nodes first.

        No more of them than a path has are a chain: one that ends where the draft is unsure if the
        policy minds that, else vLLM's own.
        """
        count = num_speculative_tokens
        self.trees.clear_codes()
        grower = self._grower_of(count)
        self._grows = grower is not None
        if grower is None:
            return super().propose(count, *args, **kwargs)
        super().propose(1, *args, **kwargs)
        self.num_speculative_tokens = count
        num_passes = min(self._settings.depth, count - 1)
        grown = self._grow(grower, num_passes, kwargs["common_attn_metadata"])
        if isinstance(grower, PathGrower):
            return torch.cat([grower.finish_path(count) for _ in grown])
        trees = [grower.finish(self._num_nodes) for _ in grown]
        return self._write(trees)[:, :count].contiguous()

    def _grower_of(self, count: int) -> TreeGrower | None:
        """Return what grows so many draft tokens; None where vLLM drafts them, as a chain."""
        if count > self._settings.levels:
            return self._tree_grower
        self.trees.write_chains()
        return self._path_grower if count else None

    def _write(self, trees: list[DraftTree]) -> torch.Tensor:
        assert isinstance(self.trees, RunnerTrees)
        tree = trees[0] if len(trees) == 1 else DraftTree(*map(torch.cat, zip(*trees, strict=True)))
        chain_rows = self.trees.chain_rows()
        if chain_rows is not None:
            tree = replace_rows(tree, best_path(tree), chain_rows)
        self.trees.write(tree)
        return tree.token

    def _sample_draft_tokens(
        self, hidden_states: torch.Tensor, sampling_metadata: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keep the roots' hidden states ``[R, D]``; a tree has no single draft token."""
        if not self._grows:
            return super()._sample_draft_tokens(hidden_states, sampling_metadata)
        self._root_hidden = hidden_states
        return hidden_states.new_zeros(hidden_states.shape[0], dtype=torch.int64), None

    def _grow(self, grower: TreeGrower, num_passes: int, batch: Any) -> Iterator[None]:
        """Grow the trees of the batch; what the grower holds at each yield is to be finished."""
        hidden_RD, rows_R = self._root_hidden, self._first_draft_rows
        assert hidden_RD is not None
        assert rows_R is not None
        self._root_hidden = self._first_draft_rows = None
        root_R, width = self.positions[rows_R], grower.width
        for part in parts_of(len(root_R), width, self.max_num_tokens):
            frontier = grower.start(self.model.compute_logits(hidden_RD[part]))
            if num_passes:
                count = part.stop - part.start
                rows = spread_rows(rows_R, count, width)
                self.draft_rows.select_rows(rows)
                rows_R = torch.arange(count * width, len(rows), device=rows.device)
                passes = self._passes(root_R[part], width, num_passes, _part_of(batch, part))
                self._run_passes(grower, frontier, hidden_RD[part], passes)
            yield

    def _run_passes(
        self, grower: TreeGrower, frontier: Frontier, hidden_RD: torch.Tensor, passes: _Passes
    ) -> None:
        """Grow the trees behind the roots, whose hidden states are ``[R, D]``, level by level."""
        num_requests, width = frontier.token.shape
        hidden_RXD = hidden_RD.unsqueeze(1)
        for level in range(1, len(passes.positions) + 1):
            # On a CPU there is no queue of work that a look at the outcome would hold up.
            if self._on_cpu and self._settings.is_confident and grower.is_done():
                break
            if width > 1:
                index_RWD = frontier.parent_row.unsqueeze(-1).expand(-1, -1, hidden_RXD.shape[-1])
                hidden_RXD = hidden_RXD.gather(1, index_RWD)
            hidden_BD = self._level(level, frontier, hidden_RXD, passes)
            hidden_RXD = hidden_BD.view(num_requests, width, -1)
            logits_BV = self.model.compute_logits(hidden_BD)
            frontier = grower.expand(logits_BV.view(num_requests, width, -1))
        self.trees.clear_codes()

    def _level(
        self, level: int, frontier: Frontier, hidden_RWD: torch.Tensor, passes: _Passes
    ) -> torch.Tensor:
        """Run the draft over one level's nodes; return their hidden states ``[B, D]``."""
        num_rows = frontier.token.numel()
        self.input_ids[:num_rows] = frontier.token.flatten()
        self.positions[:num_rows] = passes.positions[level - 1]
        # Logits need all of a state, the next pass what the draft reads of it.
        width_read = self.hidden_states.shape[1]
        self.hidden_states[:num_rows] = hidden_RWD.flatten(0, 1)[:, :width_read]
        if passes.width > 1:
            assert isinstance(self.trees, RunnerTrees)
            self.trees.codes.set_draft(frontier.path.flatten(0, 1))
        metadata = passes.metadata(level, self.max_model_len)
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

    def _passes(self, root_R: torch.Tensor, width: int, num_levels: int, batch: Any) -> _Passes:
        """Describe the passes behind the roots, whose positions are int64 ``[R]``."""
        num_requests = root_R.shape[0]
        level_L1 = torch.arange(1, num_levels + 1, device=root_R.device).unsqueeze(1)
        position_LR = (root_R + level_L1).clamp_(max=self.max_model_len - 1)
        seq_len_LR = (root_R + 1 + level_L1 * width).clamp_(max=self.max_model_len)
        return _Passes(
            batch,
            width,
            positions=position_LR.repeat_interleave(width, dim=1),
            slots=self._slots_behind(root_R, width * num_levels, batch.block_table_tensor)
            .view(num_requests, num_levels, width)
            .transpose(0, 1)
            .flatten(1),
            seq_lens=seq_len_LR.to(batch.seq_lens.dtype),
            starts=self.arange[: num_requests + 1] * width,
            starts_cpu=torch.arange(0, num_requests * width + 1, width, dtype=torch.int32),
        )

    def _slots_behind(
        self, root_R: torch.Tensor, count: int, block_table: torch.Tensor
    ) -> torch.Tensor:
        """Return the next ``count`` KV slots, int64 ``[R, count]``; none past the last position."""
        place_RX = root_R.unsqueeze(1) + torch.arange(1, count + 1, device=root_R.device)
        block_RX = (place_RX // self.block_size).clamp_(max=block_table.shape[1] - 1)
        slot_RX = block_table.gather(1, block_RX).long() * self.block_size
        slot_RX += place_RX % self.block_size
        return slot_RX.masked_fill_(place_RX >= self.max_model_len, _NO_SLOT)


def _part_of(batch: Any, part: slice) -> Any:
    """Return vLLM's description of some requests of the batch, as far as `_Passes` reads it."""
    if part == slice(0, batch.num_reqs):
        return batch
    upper = batch.seq_lens_cpu_upper_bound
    is_prefilling = batch.is_prefilling
    return replace(
        batch,
        num_reqs=part.stop - part.start,
        block_table_tensor=batch.block_table_tensor[part],
        seq_lens_cpu_upper_bound=None if upper is None else upper[part],
        is_prefilling=None if is_prefilling is None else is_prefilling[part],
    )
