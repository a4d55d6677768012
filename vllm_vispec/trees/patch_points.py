"""What draft trees rely on in vLLM."""

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint
from vllm_vispec.compat.patching import patch
from vllm_vispec.trees.setting import has_branches, has_tree

_ATTENTION = "vllm.model_executor.layers.attention.attention"
_V2_STATE = "vllm.v1.worker.gpu.model_states.interface"
_V2_SAMPLER = "vllm.v1.worker.gpu.spec_decode.rejection_sampler"
_V2_AR = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"
_V2_DRAFT = "vllm.v1.worker.gpu.spec_decode.speculator"
_V2_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
_V2_BATCH = "vllm.v1.worker.gpu.input_batch"
_V2_TABLES = "vllm.v1.worker.gpu.block_table"
_V2_AR_GRAPHS = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils"

FEATURE, REMEDY = "draft trees", 'leave "tree" out of the speculative config'


def _apply_slots() -> None:
    """Let schedulers reserve what trees need; they run in processes without a worker, too."""
    from vllm.config import VllmConfig

    from vllm_vispec.trees import slots

    patch(VllmConfig, "num_lookahead_tokens", slots.num_lookahead_tokens)


def apply_attention() -> None:
    """Let attention layers have room for path codes."""
    from vllm.model_executor.layers.attention import Attention

    from vllm_vispec.trees import attention

    patch(Attention, "__init__", attention.init_padded)
    patch(Attention, "get_kv_cache_spec", attention.padded_kv_cache_spec)


def _apply_v2() -> None:
    """Let the V2 model runner verify trees."""
    from vllm.v1.worker.gpu.model_states.interface import ModelState

    from vllm_vispec.trees import model_state

    patch(ModelState, "custom_sampler", model_state.custom_sampler)


TREE_SLOTS = PatchGroup(
    name="tree slots",
    feature=FEATURE,
    remedy=REMEDY,
    is_needed=has_tree,
    apply=_apply_slots,
    points=(
        PatchPoint(
            "wraps",
            "vllm.config.vllm:VllmConfig.num_lookahead_tokens",
            "KV slots for the draft passes over a tree",
        ),
    ),
)

TREES = PatchGroup(
    name="trees",
    feature=FEATURE,
    remedy=REMEDY,
    is_needed=has_branches,
    apply=apply_attention,
    points=(
        PatchPoint(
            "wraps",
            f"{_ATTENTION}:Attention.__init__"
            "(num_heads, head_size, scale, alibi_slopes, cache_config, logits_soft_cap)",
            "heads a few channels wider, in engines with trees alone",
        ),
        PatchPoint(
            "wraps",
            f"{_ATTENTION}:Attention.get_kv_cache_spec(vllm_config)",
            "the KV cache has the padded head size",
        ),
        PatchPoint(
            "subclasses",
            f"{_ATTENTION}:Attention.self.impl",
            "the backend's implementation pads what comes in and cuts what goes out",
        ),
        PatchPoint(
            "reads",
            f"{_ATTENTION}:get_attention_context(layer_name)",
            "layers store into `kv_cache` of their own",
        ),
        PatchPoint(
            "reads",
            "vllm.v1.attention.backend:AttentionBackend.forward_includes_kv_cache_update",
            "backends that store keys while they attend are refused",
        ),
        PatchPoint(
            "calls",
            "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update"
            "(layer, key, value, kv_cache, slot_mapping)",
            "padded keys are stored; where a block keeps them is learned from it; -1 skips",
        ),
        PatchPoint(
            "reads",
            "vllm.config.speculative:SpeculativeConfig.num_speculative_tokens_per_batch_size",
            "whether a load schedule has numbers of draft tokens so small that they are chains",
        ),
    ),
)

V2_TREES = PatchGroup(
    name="trees",
    feature=FEATURE,
    remedy=REMEDY,
    runner="v2",
    is_needed=has_branches,
    apply=_apply_v2,
    points=(
        PatchPoint(
            "wraps",
            f"{_V2_STATE}:ModelState.custom_sampler(sampler)",
            "the walk along the target's own samples",
        ),
        PatchPoint(
            "wraps",
            f"{_V2_STATE}:ModelState.prepare_inputs(input_batch, req_states)",
            "positions by level, and codes (one object only)",
        ),
        PatchPoint(
            "wraps",
            f"{_V2_STATE}:ModelState.add_request(req_index, new_req_data)",
            "which requests need a chain (one object only)",
        ),
        PatchPoint(
            "wraps",
            f"{_V2_STATE}:ModelState.remove_request(req_id)",
            "which requests need a chain (one object only)",
        ),
        PatchPoint(
            "overrides",
            f"{_V2_SAMPLER}:RejectionSampler.__call__(logits, input_batch)",
            "positions count tokens again",
        ),
        PatchPoint(
            "overrides",
            f"{_V2_SAMPLER}:RejectionSampler._verify"
            "(logits, draft_sampled, pos, cu_num_logits, idx_mapping, expanded_idx_mapping, "
            "verify_draft_sampled)",
            "the walk along the target's own samples",
        ),
        PatchPoint(
            "calls",
            "vllm.v1.worker.gpu.sample.sampler:Sampler.apply_sampling_params"
            "(logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, input_ids)",
            "logits as plain decoding samples from them",
        ),
        PatchPoint(
            "reads",
            "vllm.v1.worker.gpu.sample.sampler:Sampler.self.return_sampling_mask",
            "whether rows of logits are read behind the walk",
        ),
        PatchPoint(
            "calls",
            "vllm.v1.worker.gpu.sample.states:SamplingStates.max_num_logprobs(idx_mapping_np)",
            "whether rows of logits are read behind the walk",
        ),
        PatchPoint(
            "reads",
            "vllm.v1.worker.gpu.sample.states:NO_LOGPROBS",
            "whether rows of logits are read behind the walk",
        ),
        PatchPoint(
            "calls",
            "vllm.v1.worker.gpu.sample.gumbel:gumbel_sample"
            "(logits, expanded_idx_mapping, temperature, seed, pos, apply_temperature)",
            "the draws of plain decoding",
        ),
        PatchPoint(
            "calls",
            f"{_V2_AR}:TargetDependentARSpeculator._run_model"
            "(num_tokens, attn_metadata, slot_mappings, num_tokens_across_dp)",
            "passes over levels",
        ),
        PatchPoint(
            "overrides",
            f"{_V2_AR}:TargetDependentARSpeculator.capture",
            "graphs of one-token steps are not recorded",
        ),
        PatchPoint(
            "overrides",
            f"{_V2_DRAFT}:DraftModelSpeculator.sample_draft(hidden_states)",
            "the first pass draws no token",
        ),
        PatchPoint(
            "calls",
            f"{_V2_DRAFT}:DraftModelSpeculator._build_uniform_attn_metadata"
            "(batch_desc, num_reqs, num_query_per_req, seq_lens_cpu_upper_bound, step)",
            "passes over levels",
        ),
        PatchPoint(
            "calls",
            f"{_V2_TABLES}:BlockTables.compute_slot_mappings"
            "(idx_mapping, query_start_loc, positions, num_tokens_padded)",
            "slots of a level's nodes",
        ),
        PatchPoint(
            "calls",
            f"{_V2_TABLES}:BlockTables.gather_block_tables(idx_mapping, num_reqs_padded)",
            "blocks of the requests whose trees are grown after the others",
        ),
        PatchPoint(
            "calls",
            "vllm.v1.worker.gpu.attn_utils:build_slot_mappings_by_layer"
            "(slot_mappings, kv_cache_config)",
            "slots of a level's nodes",
        ),
        PatchPoint(
            "calls",
            f"{_V2_GRAPHS}:BatchExecutionDescriptor",
            "passes over levels that no graph holds",
        ),
        PatchPoint(
            "overrides",
            f"{_V2_GRAPHS}:CudaGraphManager._init_candidates",
            "graphs of whole trees, a level's width in tokens for each request",
        ),
        PatchPoint(
            "reads",
            f"{_V2_GRAPHS}:CudaGraphManager.self._capture_descs",
            "the graphs that are recorded; some are taken out",
        ),
        PatchPoint(
            "calls",
            f"{_V2_GRAPHS}:CudaGraphManager.__init__"
            "(vllm_config, device, cudagraph_mode, decode_query_len)",
            "graphs of the walk, one row for each request",
        ),
        PatchPoint(
            "calls",
            f"{_V2_GRAPHS}:CudaGraphManager.run_fullgraph(desc)",
            "replays the growth of trees, and the walk",
        ),
        PatchPoint(
            "calls",
            f"{_V2_AR_GRAPHS}:SpeculatorCudaGraphManager.capture"
            "(forward_fn, model_state, input_buffers, block_tables, attn_groups)",
            "records the growth of trees; lists one graph for each scheduled number",
        ),
        PatchPoint(
            "reads",
            f"{_V2_AR_GRAPHS}:SpeculatorBatchDescriptor.num_speculative_tokens",
            "no graphs of chains as long as a tree has nodes",
        ),
        PatchPoint(
            "calls",
            "vllm.v1.worker.gpu.dp_utils:dispatch_cg_and_sync_dp"
            "(cudagraph_manager, num_reqs, num_tokens, uniform_token_count, need_eager)",
            "the graph for a batch",
        ),
        PatchPoint(
            "overrides",
            f"{_V2_AR}:TargetDependentARSpeculator.init_cudagraph_manager(cudagraph_mode)",
            "what is recorded",
        ),
        PatchPoint(
            "calls",
            f"{_V2_DRAFT}:DraftModelSpeculator._update_draft_decode_metadata"
            "(attn_metadata, num_reqs)",
            "passes over levels inside a graph",
        ),
        PatchPoint(
            "overrides",
            f"{_V2_GRAPHS}:CudaGraphManager.capture(create_forward_fn, progress_bar_desc)",
            "behind `SpeculatorCudaGraphManager.capture`: no graphs of chains as long as trees",
        ),
        PatchPoint(
            "reads",
            f"{_V2_DRAFT}:DraftModelSpeculator.self.supports_decode_metadata_update",
            "whether a graph can hold the growth of trees",
        ),
        PatchPoint(
            "reads",
            f"{_V2_DRAFT}:DraftModelSpeculator.self.attn_cg_support",
            "whether a graph can hold the growth of trees",
        ),
        PatchPoint(
            "calls",
            "vllm.v1.worker.utils:AttentionGroup.get_metadata_builder",
            "whether a graph can hold the growth of trees",
        ),
        PatchPoint(
            "reads",
            "vllm.v1.attention.backend:AttentionMetadataBuilder.reorder_batch_threshold",
            "the longest request that a builder does not take for a prefill",
        ),
        PatchPoint(
            "calls",
            "vllm.v1.worker.utils:AttentionGroup.map_to_kernel_block_table(block_table)",
            "what vLLM does before it replays draft steps",
        ),
        PatchPoint(
            "reads",
            "vllm.config.compilation:CompilationConfig.max_cudagraph_capture_size",
            "up to how many requests the target verifies trees in graphs",
        ),
        PatchPoint(
            "reads",
            f"{_V2_BATCH}:InputBatch.idx_mapping",
            "whose trees a batch has",
        ),
        PatchPoint(
            "reads",
            f"{_V2_BATCH}:InputBatch.num_draft_tokens",
            "whether a batch has drafts",
        ),
        PatchPoint(
            "reads",
            f"{_V2_BATCH}:InputBatch.logits_indices",
            "which tokens are the trees' nodes",
        ),
        PatchPoint(
            "reads",
            f"{_V2_BATCH}:InputBatch.cu_num_logits",
            "where each request's nodes begin",
        ),
        PatchPoint(
            "reads",
            f"{_V2_BATCH}:InputBatch.input_ids",
            "accepted tokens move to the front",
        ),
        PatchPoint(
            "reads",
            f"{_V2_BATCH}:InputBatch.positions",
            "nodes have the positions of their levels",
        ),
        PatchPoint(
            "reads",
            f"{_V2_BATCH}:InputBatch.seq_lens_cpu_upper_bound",
            "longest sequence of a batch",
        ),
        PatchPoint(
            "reads",
            f"{_V2_DRAFT}:DraftModelSpeculator.self.idx_mapping",
            "whose trees are grown, -1 for requests that pad a recorded batch",
        ),
        PatchPoint(
            "reads",
            f"{_V2_DRAFT}:DraftModelSpeculator.self.input_buffers",
            "what passes over levels read",
        ),
        PatchPoint(
            "reads",
            f"{_V2_DRAFT}:DraftModelSpeculator.self.draft_tokens",
            "where vLLM looks for the drafts",
        ),
        PatchPoint(
            "reads",
            f"{_V2_TABLES}:BlockTables.self.slot_mappings",
            "slots of a level's nodes, in memory that graphs know",
        ),
        PatchPoint(
            "reads",
            f"{_V2_TABLES}:BlockTables.self.input_block_tables",
            "what vLLM maps before it replays draft steps",
        ),
    ),
)

GROUPS = (TREE_SLOTS, TREES, V2_TREES)
