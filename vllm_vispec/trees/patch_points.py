"""What draft trees rely on in vLLM."""

from functools import partial
from typing import Any

from vllm_vispec.compat.patch_point import PatchGroup, calls, reads, subclasses, wraps
from vllm_vispec.compat.patching import patch
from vllm_vispec.config import hides_images
from vllm_vispec.trees.limits import has_branches, has_paths, has_tree

_BACKEND = "vllm.v1.attention.backend"
_WORKER = "vllm.v1.worker"
_V2 = f"{_WORKER}.gpu"
_V2_AR = f"{_V2}.spec_decode.target_dependent_ar"

_group = partial(
    PatchGroup, feature="draft trees", remedy='leave "tree" out of the speculative config'
)


def _apply_slots() -> None:
    """Let schedulers reserve what trees need; they run in processes without a worker, too."""
    from vllm.config import VllmConfig

    from vllm_vispec.trees import limits

    patch(VllmConfig, "num_lookahead_tokens", limits.num_lookahead_tokens)


def _has_wide_layers(vllm_config: Any) -> bool:
    return has_branches(vllm_config) or hides_images(vllm_config)


def apply_attention() -> None:
    """Let attention heads have room for node codes and for masks of image rows."""
    from vllm.model_executor.layers.attention import Attention

    from vllm_vispec.trees import attention

    patch(Attention, "__init__", attention.init_padded)


def _verifies(vllm_config: Any) -> bool:
    return has_branches(vllm_config) or has_paths(vllm_config)


def _apply_v2() -> None:
    """Let the V2 model runner verify trees, and paths up to their ends."""
    from vllm.v1.worker.gpu import model_states

    from vllm_vispec.trees import model_state

    patch(model_states, "resolve_model_state_cls", model_state.resolve_model_state_cls)


TREE_SLOTS = _group(
    name="tree slots",
    is_needed=has_tree,
    apply=_apply_slots,
    points=(
        wraps(
            "vllm.config.vllm:VllmConfig.num_lookahead_tokens",
            "KV slots for the draft passes over a tree",
        ),
    ),
)

TREES = _group(
    name="trees",
    feature="draft trees, and published models that see a share of images",
    remedy='leave "tree" and "images" out of the speculative config',
    is_needed=_has_wide_layers,
    apply=apply_attention,
    points=(
        subclasses(
            f"{_BACKEND}:AttentionBackend"
            "{customize_spec(spec), get_impl_cls, forward_includes_kv_cache_update}",
            "heads and KV cache have the padded size; backends that store keys while they attend "
            "are refused",
        ),
        wraps(
            "vllm.model_executor.layers.attention.attention:Attention"
            "{__init__(num_heads, head_size, scale, alibi_slopes, cache_config, logits_soft_cap, "
            "per_layer_sliding_window, attn_type, attn_backend, head_size_v), "
            "get_kv_cache_spec(vllm_config), self.attn_backend, self.head_size, self.impl, "
            "self.kv_cache, self.kv_cache_dtype, self.kv_sharing_target_layer_name, "
            "self.layer_name, self.num_heads, self.num_kv_heads}",
            "layers are built on a backend with wider heads; their caches are read and written",
        ),
        reads(
            f"{_WORKER}.utils:customize_attention_spec(backend, spec)",
            "both runners ask the backend what its KV cache is",
        ),
        subclasses(
            "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update"
            "(layer, key, value, kv_cache, slot_mapping)",
            "padded keys are stored; where a block keeps them is learned from it; -1 skips",
        ),
    ),
)

V2_TREES = _group(
    name="trees",
    runner="v2",
    is_needed=_verifies,
    apply=_apply_v2,
    points=(
        wraps(
            f"{_V2}.model_states:resolve_model_state_cls(vllm_config, model)",
            "the model state of an engine with trees is a subclass",
        ),
        subclasses(
            f"{_V2}.model_states.interface:ModelState"
            "{custom_sampler(sampler), prepare_inputs(input_batch, req_states), "
            "add_request(req_index, new_req_data), remove_request(req_id)}",
            "positions by level, codes, the sampler, and which requests must get a chain",
        ),
        subclasses(
            f"{_V2}.spec_decode.rejection_sampler:RejectionSampler"
            "{__init__(sampler, spec_config, device), "
            "__call__(logits, input_batch, draft_logits, invalid_drafts), "
            "_verify(logits, draft_logits, draft_sampled, pos, cu_num_logits, idx_mapping, "
            "idx_mapping_np, expanded_idx_mapping, expanded_local_pos, seq_lens_upper_bound_np, "
            "verify_draft_sampled)}",
            "the target's token behind every node decides the accepted path; drafts behind a "
            "path's end are not verified",
        ),
        calls(
            f"{_V2}.sample.sampler:Sampler"
            "{sample(logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, input_ids, "
            "expanded_local_pos, seq_lens_upper_bound_np, return_logprobs), "
            "self.return_sampling_mask, self.sampling_states}",
            "the samples of plain decoding",
        ),
        calls(
            f"{_V2}.sample.states:SamplingStates.max_num_logprobs(idx_mapping_np)",
            "whether rows of logits are read behind verification",
        ),
        subclasses(
            f"{_V2_AR}.speculator:TargetDependentARSpeculator"
            "{_run_model(num_tokens, attn_metadata, slot_mappings, num_tokens_across_dp), capture, "
            "init_cudagraph_manager(cudagraph_mode), self.decode_cudagraph_manager, "
            "self.hidden_states}",
            "passes over levels, and what is recorded",
        ),
        subclasses(
            f"{_V2}.spec_decode.speculator:DraftModelSpeculator"
            "{sample_draft(hidden_states), "
            "_maybe_predict_acceptance(logits, idx_mapping, draft_step), "
            "observe_verification(idx_mapping, num_sampled, num_rejected), "
            "self.use_local_argmax_reduction, _build_uniform_attn_metadata(batch_desc, num_reqs, "
            "num_query_per_req, seq_lens_cpu_upper_bound, step), "
            "_update_draft_decode_metadata(attn_metadata, num_reqs), self.attn_cg_support, "
            "self.attn_groups, self.block_tables, self.draft_max_seq_len, self.draft_tokens, "
            "self.idx_mapping, self.input_buffers, self.kv_cache_config, self.model_state, "
            "self.supports_decode_metadata_update}",
            "passes over levels, eagerly and inside a graph, and the buffers that they fill; the "
            "logits of every draft token of a path",
        ),
        calls(
            f"{_V2}.block_table:BlockTables"
            "{compute_slot_mappings(idx_mapping, query_start_loc, positions, num_tokens_padded), "
            "self.slot_mappings, self.input_block_tables}",
            "slots of a level's nodes, in memory that graphs know",
        ),
        calls(
            f"{_V2}.attn_utils:build_slot_mappings_by_layer(slot_mappings, kv_cache_config)",
            "slots of a level's nodes",
        ),
        calls(
            f"{_V2}.cudagraph_utils:CudaGraphManager"
            "{__init__(vllm_config, device, cudagraph_mode, decode_query_len), "
            "capture(create_forward_fn, progress_bar_desc), "
            "dispatch(num_reqs, num_tokens, uniform_token_count, num_active_loras), "
            "needs_capture, run_fullgraph(desc), self.graphs}",
            "graphs of growth and verification: listed, recorded, found and replayed",
        ),
        calls(
            f"{_V2_AR}.cudagraph_utils:SpeculatorCudaGraphManager.capture"
            "(forward_fn, model_state, input_buffers, block_tables, attn_groups)",
            "records the growth of trees; lists one graph for each scheduled number",
        ),
        calls(
            f"{_WORKER}.utils:AttentionGroup"
            "{map_to_kernel_block_table(block_table), get_metadata_builder}",
            "what vLLM does before it replays draft steps; whether a graph can hold trees",
        ),
        reads(
            f"{_BACKEND}:AttentionMetadataBuilder.reorder_batch_threshold",
            "the longest request that a builder does not take for a prefill",
        ),
        reads(
            f"{_V2}.input_batch:InputBatch"
            "{req_ids, idx_mapping, num_tokens, num_draft_tokens, logits_indices, cu_num_logits, "
            "expanded_idx_mapping, expanded_local_pos, input_ids, positions, "
            "seq_lens_cpu_upper_bound}",
            "whose trees a batch has, which tokens are their nodes, and where those lie",
        ),
    ),
)

GROUPS = (TREE_SLOTS, TREES, V2_TREES)
