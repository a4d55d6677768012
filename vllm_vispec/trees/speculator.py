"""Drafting trees on the V2 model runner.

Shapes: R requests, W nodes expanded in a pass, B = R * W rows of a pass, D hidden size, V
vocabulary, N nodes.
"""

from itertools import chain
from typing import Any

import torch
from torch import nn
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)

from vllm_vispec.trees.attention import draft_code_buffers
from vllm_vispec.trees.codes import CodeBuffers
from vllm_vispec.trees.cudagraph import (
    EAGERLY,
    chain_manager,
    log_growth,
    log_recorded_growth,
    manager_for,
    why_eager,
)
from vllm_vispec.trees.grow import Frontier, TreeGrower
from vllm_vispec.trees.limits import (
    draft_slots,
    note_requests_without_tree,
    schedules_chains,
    settings_of,
)
from vllm_vispec.trees.paths import PathSpeculator
from vllm_vispec.trees.verify import NO_REQUEST, EngineTrees

_NO_SLOT = -1


class TreeSpeculator(PathSpeculator):
    """Runs vLLM's first pass for one draft, then one pass for each level of the trees."""

    # The roots' tokens, where the first pass ends before them: they have a pass of their own.
    root_tokens: torch.Tensor | None = None
    decode_cudagraph_manager: SpeculatorCudaGraphManager | None
    # None until vLLM has told where keys and values lie: while it profiles its memory.
    trees: EngineTrees | None = None
    tree_cudagraph_manager: SpeculatorCudaGraphManager | None = None
    verification_cudagraph_manager: CudaGraphManager | None = None

    def load_model(self, target_model: nn.Module) -> None:
        """Load the head."""
        super().load_model(target_model)
        self._settings = settings_of(self.vllm_config)
        self._schedules_chains = schedules_chains(self.vllm_config, self._settings)
        self._allocate(draft_code_buffers(self.vllm_config))

    def _allocate(self, codes: CodeBuffers) -> None:
        """Make what every step reads and writes; recorded graphs know its addresses."""
        self._codes, self._width = codes, self._settings.width
        self._num_nodes = self.vllm_config.num_speculative_tokens
        # Of the drafts' own width, whatever the next pass reads of it.
        shape = self.max_num_reqs, self.hidden_size
        self._root_hidden = torch.zeros(shape, dtype=self.dtype, device=self.device)

    def set_attn(self, model_state: Any, *args: Any, **kwargs: Any) -> None:
        """Find the trees that the target is verified with."""
        super().set_attn(model_state, *args, **kwargs)
        self.trees = model_state.trees

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Decide what is recorded: the first pass, the steps of scheduled chains, whole trees."""
        super().init_cudagraph_manager(cudagraph_mode)
        chains = self.decode_cudagraph_manager
        assert chains is not None
        # A root with a pass of its own is a step, too.
        steps = self._settings.levels + (self.root_tokens is not None)
        longest = steps if self._schedules_chains else 0
        self.decode_cudagraph_manager = chain_manager(chains, longest)
        reason = why_eager(self, self._width, cudagraph_mode)
        if reason is not None:
            log_growth(f"{EAGERLY}: %s", reason)
        mode = CUDAGraphMode.FULL_DECODE_ONLY if reason is None else CUDAGraphMode.NONE
        self.tree_cudagraph_manager = manager_for(chains, None, mode, self._width)
        # Verification is nobody's pass: it has one row for each request.
        self.verification_cudagraph_manager = CudaGraphManager(
            self.vllm_config, self.device, chains.cudagraph_mode, decode_query_len=1
        )
        self.model_state.recorded_verification.use_manager(self.verification_cudagraph_manager)

    def capture(self) -> None:
        """Record the first pass, the steps of scheduled chains, and trees: verified and grown."""
        super().capture()
        verification = self.verification_cudagraph_manager
        if verification is not None and verification.needs_capture():
            self.model_state.recorded_verification.record(verification)
        manager = self.tree_cudagraph_manager
        if manager is None or manager.cudagraph_mode == CUDAGraphMode.NONE:
            return
        self._codes.clear_codes()
        # No request: nothing is stored anywhere.
        self.idx_mapping.fill_(NO_REQUEST)
        manager.capture(
            self._grow,
            self.model_state,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            progress_bar_desc="Capturing draft tree CUDA graphs",
        )
        log_recorded_growth(manager, self._width)

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        *args: Any,
        num_speculative_tokens: int | None = None,
        dummy_run: bool = False,
        is_profile: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the trees' tokens ``[R, N]``, best nodes first.

        No more of them than a path has are drafted as vLLM drafts a chain, at a chain's cost.
        vLLM's memory profile grows trees of the largest batch, without attention, as its draft
        steps run there.
        """
        if self.trees is not None:
            self.trees.move_accepted(input_batch.input_ids, last_hidden_states, slot_mappings)
        count = self._num_nodes if num_speculative_tokens is None else num_speculative_tokens
        is_chain = count <= self._settings.levels
        drafts = super().propose(
            input_batch,
            attn_metadata,
            slot_mappings,
            last_hidden_states,
            *args,
            num_speculative_tokens=count if is_chain else int(self.root_tokens is None),
            step_draft_tokens=count,
            dummy_run=dummy_run,
            is_profile=is_profile,
            **kwargs,
        )
        if not is_chain and (is_profile or not dummy_run):
            self._grow_batch(input_batch, is_profile=is_profile)
        # Without drafts nothing is verified.
        if self.trees is not None and count and not dummy_run:
            is_linear = None if is_chain else self.model_state.linear_requests(input_batch.req_ids)
            if is_chain:
                length_R = None if self.ends is None else self.ends.length[: input_batch.num_reqs]
                self.trees.table.write_chains(input_batch.idx_mapping.long(), length_R)
            elif is_linear is not None:
                slots = input_batch.idx_mapping.long()
                self.trees.replace_with_chains(is_linear, slots, drafts)
        return drafts

    def sample_draft(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keep the roots' hidden states ``[R, D]``; return no token, a tree begins with many.

        A recorded first pass serves trees and chains, so it draws where there may be chains.
        """
        self._root_hidden[: hidden_states.shape[0]] = hidden_states
        if self._schedules_chains:
            return super().sample_draft(hidden_states, *args, **kwargs)
        return hidden_states.new_zeros(hidden_states.shape[0], dtype=torch.int64)

    def _grow_batch(self, input_batch: InputBatch, *, is_profile: bool) -> None:
        """Grow the trees behind the roots that the first pass has left in the buffers.

        A pass has room for ``max_num_batched_tokens`` rows.  Requests with drafts bring more tokens
        than a level of their trees has rows, so a whole batch fits but for steps in which very many
        short prompts end.  There the last requests go without a tree in this step.
        """
        num_requests = input_batch.num_reqs
        count = min(num_requests, self.max_num_tokens // self._width)
        bound_R = input_batch.seq_lens_cpu_upper_bound[:num_requests]
        longest = int(bound_R.max()) + draft_slots(self.vllm_config, self._settings)
        self.draft_max_seq_len = min(longest, self.max_model_len)
        rows_R = torch.arange(count, device=self.device)
        self.draft_rows.select_rows(rows_R.repeat_interleave(self._width))
        if count < num_requests:
            if not is_profile:
                note_requests_without_tree(self._width)
            self.idx_mapping[count:] = NO_REQUEST
            self.draft_tokens[count:num_requests] = 0
            if self.trees is not None:
                self.trees.table.write_chains(input_batch.idx_mapping[count:].long())
        self._grow_first(count, bound_R[:count], is_profile=is_profile)

    def _grow_first(self, num_requests: int, bound_R: torch.Tensor, *, is_profile: bool) -> None:
        """Grow the trees of the requests in front, by a recorded graph if there is one."""
        num_rows = num_requests * self._width
        starts = self.input_buffers.query_start_loc
        torch.arange(0, len(starts) * self._width, self._width, dtype=starts.dtype, out=starts)
        # Requests that pad a recorded batch have no rows.
        starts.clamp_(max=num_rows)
        if is_profile:
            self._grow(num_requests, num_rows, None, None)
            return
        # Engines that are data parallel have no trees, so there is nobody to agree with.
        manager = self.tree_cudagraph_manager
        assert manager is not None
        desc = manager.dispatch(num_requests, num_rows, self._width, num_active_loras=0)
        if desc.cg_mode == CUDAGraphMode.FULL:
            for group in chain.from_iterable(self.attn_groups):
                blocks = self.block_tables.input_block_tables[group.kv_cache_group_id]
                group.map_to_kernel_block_table(blocks)
            manager.run_fullgraph(desc)
            return
        slots_GB = self.block_tables.slot_mappings[:, :num_rows]
        slot_mappings = build_slot_mappings_by_layer(slots_GB, self.kv_cache_config)
        self._grow(num_requests, num_rows, None, slot_mappings, eager=(desc, bound_R))

    def _grow(
        self,
        num_requests: int,
        num_rows: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        num_tokens_across_dp: torch.Tensor | None = None,
        cudagraph_runtime_mode: CUDAGraphMode = CUDAGraphMode.NONE,
        eager: tuple[BatchExecutionDescriptor, torch.Tensor] | None = None,
    ) -> None:
        """Grow the trees of the first requests, from buffers into buffers.

        Nothing in here reads from the device, nor depends on more than the number of requests.

        Args:
            num_requests: R, padding included.
            num_rows: B.
            attn_metadata: Of the static buffers, refreshed for every level; None: made for every
                level, if there are slots.
            slot_mappings: By layer, of static memory; None: passes run without attention.
            num_tokens_across_dp: As vLLM's passes take it.
            cudagraph_runtime_mode: The same.
            eager: Only where metadata are made: vLLM's description of the pass, and its upper bound
                of the sequences' lengths, int32 ``[R]`` on the host.
        """
        root_R = self.input_buffers.positions[:num_requests] + (self.root_tokens is not None)
        hidden_RXD = self._root_hidden[:num_requests].unsqueeze(1)

        def run_level(level: int, frontier: Frontier) -> torch.Tensor:
            """Run the draft over one level's nodes; return their hidden states ``[R, W, D]``."""
            self._write_level(level, frontier, hidden_RXD, root_R)
            metadata = attn_metadata
            if slot_mappings is not None:
                self._write_slots(level, root_R)
                metadata = self._level_metadata(level, num_requests, attn_metadata, eager)
            hidden_BD, _ = self._run_model(
                num_rows, metadata, slot_mappings, num_tokens_across_dp, cudagraph_runtime_mode
            )
            return hidden_BD[:num_rows].view(num_requests, self._width, -1)

        if self.root_tokens is not None:
            # A pass has W rows: the root, and copies that nothing reads, in the next level's slots.
            token_RW = self.root_tokens[:num_requests, None].expand(-1, self._width)
            hidden_RXD = run_level(0, Frontier.of_roots(token_RW, self._settings.levels))
        grower = TreeGrower(self._settings)
        frontier = grower.start_trees(self.model.compute_logits(hidden_RXD[:, 0]))
        for level in range(1, self._settings.depth + 1):
            hidden_RXD = run_level(level, frontier)
            logits_BV = self.model.compute_logits(hidden_RXD.flatten(0, 1))
            frontier = grower.grow_level(logits_BV.view(num_requests, self._width, -1))
        self._codes.clear_codes()
        tree = grower.finish_trees(self._num_nodes)
        # Drafts are embedded as they are: the table knows which places are empty.
        self.draft_tokens[:num_requests, -self._num_nodes :] = tree.token.clamp(min=0)
        if self.trees is not None:
            self.trees.table.write_trees(self.idx_mapping[:num_requests], tree)

    def _write_level(
        self, level: int, frontier: Frontier, hidden_RXD: torch.Tensor, root_R: torch.Tensor
    ) -> None:
        """Fill the draft's buffers with one level's nodes."""
        num_requests, buffers, longest = root_R.shape[0], self.input_buffers, self.max_model_len
        rows = buffers.input_ids, buffers.positions, self.hidden_states
        frontier.write_level(level, root_R, hidden_RXD, longest, rows)
        behind_root = self._first_place(level) + self._width
        seq_len_R = (root_R + behind_root).clamp_(max=longest)
        # Requests that pad a recorded batch have no keys.
        buffers.seq_lens[:num_requests] = seq_len_R * (self.idx_mapping[:num_requests] >= 0)
        self._codes.write_draft_codes(frontier.path.flatten(0, 1))

    def _first_place(self, level: int) -> int:
        """Return how far behind the root's slot the first of a level's is; level 0 has the root."""
        return 1 + (level - 1) * self._width if level else 0

    def _write_slots(self, level: int, root_R: torch.Tensor) -> None:
        """Find the KV slots of one level's nodes; none beyond the longest sequence."""
        num_requests = root_R.shape[0]
        places_W = torch.arange(self._width, device=root_R.device) + self._first_place(level)
        place_B = (root_R.unsqueeze(1) + places_W).flatten()
        slots_GB = self.block_tables.compute_slot_mappings(
            self.idx_mapping[:num_requests],
            self.input_buffers.query_start_loc[: num_requests + 1],
            place_B.clamp(max=self.max_model_len - 1),
            place_B.shape[0],
        )
        slots_GB.masked_fill_(place_B >= self.max_model_len, _NO_SLOT)

    def _level_metadata(
        self,
        level: int,
        num_requests: int,
        attn_metadata: dict[str, Any] | None,
        eager: tuple[BatchExecutionDescriptor, torch.Tensor] | None,
    ) -> dict[str, Any] | None:
        """Describe one level's nodes as the next W tokens of each request."""
        if eager is None:
            assert attn_metadata is not None
            self._update_draft_decode_metadata(attn_metadata, num_requests)
            return attn_metadata
        desc, bound_R = eager
        return self._build_uniform_attn_metadata(
            batch_desc=desc,
            num_reqs=num_requests,
            num_query_per_req=self._width,
            seq_lens_cpu_upper_bound=bound_R,
            step=self._first_place(level) + self._width,
        )
