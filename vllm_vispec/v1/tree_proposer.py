"""Drafting trees on the V1 model runner.

Shapes: R requests, W nodes expanded in a pass, B = R * W rows of a pass, D hidden size, V
vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_vispec.compat.patching import patch
from vllm_vispec.trees.attention import draft_code_buffers, make_engine_trees, target_layers
from vllm_vispec.trees.grow import NO_TOKEN, PathGrower, TreeGrower, best_path, replace_rows
from vllm_vispec.trees.limits import (
    has_branches,
    has_paths,
    note_requests_without_tree,
    requires_linear_draft,
    settings_of,
)
from vllm_vispec.v1.proposer import ViSpecProposer
from vllm_vispec.v1.tree_verification import RunnerTrees, TreeRejectionSampler

_NO_SLOT = -1


class TreeProposer(ViSpecProposer):
    """Runs vLLM's first pass for one draft, then one pass for each level of the trees.

    Trees of a single path, which may end early, are chains of any length to vLLM.
    """

    # None: nothing branches.
    trees: RunnerTrees | None = None

    def load_model(self, target_model: nn.Module) -> None:
        """Load the head; everything trees need is allocated before memory is profiled."""
        # No layer of the draft exists yet.
        layers = target_layers(self.vllm_config)
        super().load_model(target_model)
        self._settings, runner = settings_of(self.vllm_config), self._runner
        self._tree_grower, self._path_grower = TreeGrower(self._settings), self._make_path_grower()
        self._root_hidden: torch.Tensor | None = None
        self._grows = True
        # On a CPU there is no queue of work that a look at the outcome would hold up.
        self._may_stop = self._settings.is_confident and current_platform.is_cpu()
        patch(runner, "_get_draft_token_ids_cpu", _drafts_for_scheduler)
        patch(runner, "_input_fits_in_drafter", _fits)
        if has_branches(self.vllm_config):
            trees = make_engine_trees(self.vllm_config, layers, runner.max_num_reqs, runner.device)
            self.trees = RunnerTrees(runner, trees)
            self._codes = draft_code_buffers(self.vllm_config)
            runner.rejection_sampler = TreeRejectionSampler(
                runner.sampler, runner.speculative_config, runner.device, self.trees
            )

    def _make_path_grower(self) -> PathGrower | None:
        """Return what grows single paths; None where vLLM's chains do."""
        # With asynchronous scheduling drafts stay on the device, which the log said at start.
        if not has_paths(self.vllm_config) or self._runner.use_async_scheduling:
            return None
        return PathGrower(self._settings.one_branch())

    def propose(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the trees' tokens ``[R, num_speculative_tokens]``, best nodes first.

        If ``num_speculative_tokens <= depth + 1``, a chain is drafted instead of a tree: with early
        stopping if the policy has a threshold, else by vLLM's own loop.
        """
        count = num_speculative_tokens
        is_tree = count > self._settings.levels
        grower = self._tree_grower if is_tree else self._path_grower
        if self.trees is not None:
            self._codes.clear_codes()
            self.trees.forget_trees()
        self._grows = grower is not None and count > 0
        if grower is None or not self._grows:
            return super().propose(count, *args, **kwargs)
        super().propose(1, *args, **kwargs)
        self.num_speculative_tokens = count
        num_requests = self._grow(
            grower, min(self._settings.depth, count - 1), kwargs["common_attn_metadata"]
        )
        if isinstance(grower, PathGrower):
            return grower.finish_paths(count)
        return self._finish_trees(grower, num_requests)[:, :count].contiguous()

    def _finish_trees(self, grower: TreeGrower, num_requests: int) -> torch.Tensor:
        """Keep the trees for their verification; return their tokens ``[R, N]``."""
        assert self.trees is not None
        tree = grower.finish_trees(self.speculative_config.num_speculative_tokens)
        ids, states = self._runner.input_batch.req_ids, self._runner.requests
        flags = [requires_linear_draft(states[request_id].sampling_params) for request_id in ids]
        grown = len(tree.token)
        if any(flags[:grown]):
            is_linear_R1 = async_tensor_h2d(flags[:grown], tree.token.device).unsqueeze(1)
            tree = replace_rows(tree, best_path(tree), is_linear_R1)
        self.trees.write_trees(tree)
        return F.pad(tree.token, (0, 0, 0, num_requests - grown), value=NO_TOKEN)

    def _sample_draft_tokens(
        self, hidden_states: torch.Tensor, sampling_metadata: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keep the roots' hidden states ``[R, D]``; a tree has no single draft token."""
        if not self._grows:
            return super()._sample_draft_tokens(hidden_states, sampling_metadata)
        self._root_hidden = hidden_states
        return hidden_states.new_zeros(hidden_states.shape[0], dtype=torch.int64), None

    def _grow(self, grower: TreeGrower, num_passes: int, batch: Any) -> int:
        """Grow the trees behind the roots, level by level; return the number of requests.

        Requests for whose trees a pass has no room go without one in this step, the last ones
        first; that happens only where very many short prompts end at once.
        """
        hidden_RD, rows_R = self._root_hidden, self._first_draft_rows
        assert hidden_RD is not None
        if rows_R is None:
            # One-token steps lie behind.
            rows_R = torch.arange(len(hidden_RD), device=hidden_RD.device)
        self._root_hidden = self._first_draft_rows = None
        width, all_requests = grower.width, len(rows_R)
        num_requests = min(all_requests, self.max_num_tokens // width)
        if num_requests < all_requests:
            note_requests_without_tree(width)
        root_R, hidden_RXD = self.positions[rows_R[:num_requests]], hidden_RD[:num_requests, None]
        frontier = grower.start_trees(self.model.compute_logits(hidden_RXD[:, 0]))
        if num_passes:
            self.draft_rows.select_rows(rows_R[:num_requests].repeat_interleave(width))
        # Nodes lie in the slots behind the root, one level after the other.
        slots_RX = self._slots_behind(root_R, num_passes * width, batch.block_table_tensor)
        for level in range(1, num_passes + 1):
            if self._may_stop and grower.is_done():
                break
            rows = self.input_ids, self.positions, self.hidden_states
            frontier.write_level(level, root_R, hidden_RXD, self.max_model_len, rows)
            if width > 1:
                self._codes.write_draft_codes(frontier.path.flatten(0, 1))
            slots_B = slots_RX[:, (level - 1) * width : level * width].flatten()
            metadata = self._level_metadata(level, root_R, width, slots_B, batch)
            hidden_BD = self._run_level(level, num_requests * width, metadata)
            hidden_RXD = hidden_BD.view(num_requests, width, -1)
            logits_BV = self.model.compute_logits(hidden_BD)
            frontier = grower.grow_level(logits_BV.view(num_requests, width, -1))
        if self.trees is not None:
            self._codes.clear_codes()
        return all_requests

    def _run_level(self, level: int, num_rows: int, metadata: Any) -> torch.Tensor:
        """Run the draft over one level's nodes; return their hidden states ``[B, D]``."""
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

    def _level_metadata(
        self, level: int, root_R: torch.Tensor, width: int, slots_B: torch.Tensor, batch: Any
    ) -> Any:
        """Describe one level's nodes as the next ``width`` tokens of each request."""
        num_requests, longest, behind = len(root_R), self.max_model_len, level * width
        upper, is_prefilling = batch.seq_lens_cpu_upper_bound, batch.is_prefilling
        seq_lens_R = (root_R + 1 + behind).clamp_(max=longest).to(batch.seq_lens.dtype)
        return replace(
            batch,
            num_reqs=num_requests,
            query_start_loc=self.arange[: num_requests + 1] * width,
            query_start_loc_cpu=torch.arange(num_requests + 1, dtype=torch.int32) * width,
            seq_lens=seq_lens_R,
            num_actual_tokens=num_requests * width,
            max_query_len=width,
            max_seq_len=min(batch.max_seq_len + behind, longest),
            seq_lens_cpu_upper_bound=None if upper is None else upper[:num_requests] + behind,
            is_prefilling=None if is_prefilling is None else is_prefilling[:num_requests],
            block_table_tensor=batch.block_table_tensor[:num_requests],
            slot_mapping=slots_B,
        )

    def _slots_behind(
        self, root_R: torch.Tensor, count: int, block_table: torch.Tensor
    ) -> torch.Tensor:
        """Return the next ``count`` KV slots, int64 ``[R, count]``; none past the last position."""
        place_RX = root_R.unsqueeze(1) + torch.arange(1, count + 1, device=root_R.device)
        block_RX = (place_RX // self.block_size).clamp_(max=block_table.shape[1] - 1)
        slot_RX = block_table[: len(root_R)].gather(1, block_RX).long() * self.block_size
        slot_RX += place_RX % self.block_size
        return slot_RX.masked_fill_(place_RX >= self.max_model_len, _NO_SLOT)


def _fits(original: Callable[..., bool], metadata: Any) -> bool:
    """Stands for the runner's ``_input_fits_in_drafter``: draft up to the longest sequence too.

    Near it the scheduler takes as many of a tree's nodes as fit, the best ones; vLLM would stop a
    whole tree's number of tokens before it, and for all requests of the batch.
    """
    return metadata is not None


def _drafts_for_scheduler(
    original: Callable[..., tuple[list[list[int]], list[str]]],
) -> tuple[list[list[int]], list[str]]:
    """Cut the empty places behind trees and paths off what the host sees."""
    drafts, request_ids = original()
    return [[token for token in row if token != NO_TOKEN] for row in drafts], request_ids
