"""What draft trees touch in vLLM."""

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint

_ATTENTION = "vllm.model_executor.layers.attention.attention"
_V1_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer"
_V1_RUNNER = "vllm.v1.worker.gpu_model_runner"
_V1_SAMPLER = "vllm.v1.sample.rejection_sampler"
_V2_STATE = "vllm.v1.worker.gpu.model_states.interface"
_V2_SAMPLER = "vllm.v1.worker.gpu.spec_decode.rejection_sampler"
_V2_AR = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"
_V2_DRAFT = "vllm.v1.worker.gpu.spec_decode.speculator"
_V2_GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
_V2_BATCH = "vllm.v1.worker.gpu.input_batch"
_V2_TABLES = "vllm.v1.worker.gpu.block_table"
_V2_AR_GRAPHS = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils"

# Patched when the plugin is loaded: schedulers run in processes without a worker, too.
SCHEDULER_POINTS = (
    PatchPoint(
        "vllm.config.vllm",
        "VllmConfig.num_lookahead_tokens",
        (),
        "wraps",
        "KV slots for the draft passes over a tree",
    ),
)

_COMMON = (
    *SCHEDULER_POINTS,
    PatchPoint(
        _ATTENTION,
        "Attention.__init__",
        ("num_heads", "head_size", "scale", "alibi_slopes", "cache_config", "logits_soft_cap"),
        "wraps",
        "heads a few channels wider, in engines with trees alone",
    ),
    PatchPoint(
        _ATTENTION,
        "Attention.get_kv_cache_spec",
        ("vllm_config",),
        "wraps",
        "the KV cache has the padded head size",
    ),
    PatchPoint(
        _ATTENTION,
        "Attention.self.impl",
        (),
        "subclasses",
        "the backend's implementation pads what comes in and cuts what goes out",
    ),
    PatchPoint(
        _ATTENTION,
        "get_attention_context",
        ("layer_name",),
        "reads",
        "layers store into `kv_cache` of their own",
    ),
    PatchPoint(
        "vllm.v1.attention.backend",
        "AttentionBackend.forward_includes_kv_cache_update",
        (),
        "reads",
        "backends that store keys while they attend are refused",
    ),
    PatchPoint(
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionBackendImpl.do_kv_cache_update",
        ("layer", "key", "value", "kv_cache", "slot_mapping"),
        "calls",
        "padded keys are stored; where a block keeps them is learned from it; -1 skips",
    ),
    PatchPoint(
        "vllm.config.speculative",
        "SpeculativeConfig.num_speculative_tokens_per_batch_size",
        (),
        "reads",
        "whether a load schedule has numbers of draft tokens so small that they are chains",
    ),
)

_V1 = (
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer.propose",
        ("num_speculative_tokens", "common_attn_metadata"),
        "overrides",
        "one pass for each level behind vLLM's first pass",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer._sample_draft_tokens",
        ("hidden_states", "sampling_metadata"),
        "overrides",
        "hidden states behind the roots",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer._determine_batch_execution_and_padding",
        ("num_tokens",),
        "calls",
        "passes over levels",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer._get_slot_mapping",
        ("num_tokens", "slot_mapping"),
        "calls",
        "passes over levels",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer.self._draft_attn_layer_names",
        (),
        "reads",
        "the cache of the target's layers alone is tidied",
    ),
    PatchPoint(
        _V1_RUNNER,
        "GPUModelRunner._calc_spec_decode_metadata",
        ("num_draft_tokens", "cu_num_scheduled_tokens"),
        "wraps",
        "which requests of a batch have drafts (one object only)",
    ),
    PatchPoint(
        _V1_RUNNER,
        "GPUModelRunner._model_forward",
        ("input_ids", "positions"),
        "wraps",
        "positions by level, and codes (one object only)",
    ),
    PatchPoint(
        _V1_RUNNER,
        "GPUModelRunner._get_draft_token_ids_cpu",
        (),
        "wraps",
        "empty places are no drafts (one object only)",
    ),
    PatchPoint(
        _V1_RUNNER,
        "GPUModelRunner._input_fits_in_drafter",
        ("common_attn_metadata",),
        "wraps",
        "drafted up to the longest sequence (one object only)",
    ),
    PatchPoint(
        _V1_RUNNER,
        "GPUModelRunner.self.rejection_sampler",
        (),
        "subclasses",
        "the walk along the target's own samples",
    ),
    PatchPoint(
        _V1_SAMPLER,
        "RejectionSampler.forward",
        ("metadata", "draft_probs", "logits", "sampling_metadata"),
        "overrides",
        "the walk along the target's own samples",
    ),
    PatchPoint(
        _V1_SAMPLER,
        "RejectionSampler.apply_logits_processors",
        ("logits", "sampling_metadata", "metadata"),
        "calls",
        "for every row of logits, the last ones included",
    ),
    PatchPoint(
        _V1_SAMPLER,
        "RejectionSampler._get_logprobs_tensors",
        ("max_num_logprobs", "metadata", "logits", "target_logits", "bonus_logits"),
        "calls",
        "logprobs of the accepted paths",
    ),
    PatchPoint(
        _V1_SAMPLER,
        "apply_sampling_constraints",
        ("logits", "cu_num_draft_tokens", "sampling_metadata"),
        "calls",
        "temperature, top_k and top_p for every row of logits",
    ),
    PatchPoint(
        "vllm.forward_context",
        "ForwardContext.slot_mapping",
        (),
        "reads",
        "where each layer stored the batch",
    ),
)

_V2 = (
    PatchPoint(
        _V2_STATE,
        "ModelState.custom_sampler",
        ("sampler",),
        "wraps",
        "the walk along the target's own samples",
    ),
    PatchPoint(
        _V2_STATE,
        "ModelState.prepare_inputs",
        ("input_batch", "req_states"),
        "wraps",
        "positions by level, and codes (one object only)",
    ),
    PatchPoint(
        _V2_STATE,
        "ModelState.add_request",
        ("req_index", "new_req_data"),
        "wraps",
        "which requests need a chain (one object only)",
    ),
    PatchPoint(
        _V2_STATE,
        "ModelState.remove_request",
        ("req_id",),
        "wraps",
        "which requests need a chain (one object only)",
    ),
    PatchPoint(
        _V2_SAMPLER,
        "RejectionSampler.__call__",
        ("logits", "input_batch"),
        "overrides",
        "positions count tokens again",
    ),
    PatchPoint(
        _V2_SAMPLER,
        "RejectionSampler._verify",
        (
            "logits",
            "draft_sampled",
            "pos",
            "cu_num_logits",
            "idx_mapping",
            "expanded_idx_mapping",
            "verify_draft_sampled",
        ),
        "overrides",
        "the walk along the target's own samples",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu.sample.sampler",
        "Sampler.apply_sampling_params",
        ("logits", "expanded_idx_mapping", "idx_mapping", "idx_mapping_np", "pos", "input_ids"),
        "calls",
        "logits as plain decoding samples from them",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu.sample.sampler",
        "Sampler.self.return_sampling_mask",
        (),
        "reads",
        "whether rows of logits are read behind the walk",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu.sample.states",
        "SamplingStates.max_num_logprobs",
        ("idx_mapping_np",),
        "calls",
        "whether rows of logits are read behind the walk",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu.sample.states",
        "NO_LOGPROBS",
        (),
        "reads",
        "whether rows of logits are read behind the walk",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu.sample.gumbel",
        "gumbel_sample",
        ("logits", "expanded_idx_mapping", "temperature", "seed", "pos", "apply_temperature"),
        "calls",
        "the draws of plain decoding",
    ),
    PatchPoint(
        _V2_AR,
        "TargetDependentARSpeculator._run_model",
        ("num_tokens", "attn_metadata", "slot_mappings", "num_tokens_across_dp"),
        "calls",
        "passes over levels",
    ),
    PatchPoint(
        _V2_AR,
        "TargetDependentARSpeculator.capture",
        (),
        "overrides",
        "graphs of one-token steps are not recorded",
    ),
    PatchPoint(
        _V2_DRAFT,
        "DraftModelSpeculator.sample_draft",
        ("hidden_states",),
        "overrides",
        "the first pass draws no token",
    ),
    PatchPoint(
        _V2_DRAFT,
        "DraftModelSpeculator._build_uniform_attn_metadata",
        ("batch_desc", "num_reqs", "num_query_per_req", "seq_lens_cpu_upper_bound", "step"),
        "calls",
        "passes over levels",
    ),
    PatchPoint(
        _V2_TABLES,
        "BlockTables.compute_slot_mappings",
        ("idx_mapping", "query_start_loc", "positions", "num_tokens_padded"),
        "calls",
        "slots of a level's nodes",
    ),
    PatchPoint(
        _V2_TABLES,
        "BlockTables.gather_block_tables",
        ("idx_mapping", "num_reqs_padded"),
        "calls",
        "blocks of the requests whose trees are grown after the others",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu.attn_utils",
        "build_slot_mappings_by_layer",
        ("slot_mappings", "kv_cache_config"),
        "calls",
        "slots of a level's nodes",
    ),
    PatchPoint(
        _V2_GRAPHS,
        "BatchExecutionDescriptor",
        (),
        "calls",
        "passes over levels that no graph holds",
    ),
    PatchPoint(
        _V2_GRAPHS,
        "CudaGraphManager._init_candidates",
        (),
        "overrides",
        "graphs of whole trees, a level's width in tokens for each request",
    ),
    PatchPoint(
        _V2_GRAPHS,
        "CudaGraphManager.self._capture_descs",
        (),
        "reads",
        "the graphs that are recorded; some are taken out",
    ),
    PatchPoint(
        _V2_GRAPHS,
        "CudaGraphManager.__init__",
        ("vllm_config", "device", "cudagraph_mode", "decode_query_len"),
        "calls",
        "graphs of the walk, one row for each request",
    ),
    PatchPoint(
        _V2_GRAPHS,
        "CudaGraphManager.run_fullgraph",
        ("desc",),
        "calls",
        "replays the growth of trees, and the walk",
    ),
    PatchPoint(
        _V2_AR_GRAPHS,
        "SpeculatorCudaGraphManager.capture",
        ("forward_fn", "model_state", "input_buffers", "block_tables", "attn_groups"),
        "calls",
        "records the growth of trees; lists one graph for each scheduled number",
    ),
    PatchPoint(
        _V2_AR_GRAPHS,
        "SpeculatorBatchDescriptor.num_speculative_tokens",
        (),
        "reads",
        "no graphs of chains as long as a tree has nodes",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu.dp_utils",
        "dispatch_cg_and_sync_dp",
        ("cudagraph_manager", "num_reqs", "num_tokens", "uniform_token_count", "need_eager"),
        "calls",
        "the graph for a batch",
    ),
    PatchPoint(
        _V2_AR,
        "TargetDependentARSpeculator.init_cudagraph_manager",
        ("cudagraph_mode",),
        "overrides",
        "what is recorded",
    ),
    PatchPoint(
        _V2_DRAFT,
        "DraftModelSpeculator._update_draft_decode_metadata",
        ("attn_metadata", "num_reqs"),
        "calls",
        "passes over levels inside a graph",
    ),
    PatchPoint(
        _V2_GRAPHS,
        "CudaGraphManager.capture",
        ("create_forward_fn", "progress_bar_desc"),
        "overrides",
        "behind `SpeculatorCudaGraphManager.capture`: no graphs of chains as long as trees",
    ),
    PatchPoint(
        _V2_DRAFT,
        "DraftModelSpeculator.self.supports_decode_metadata_update",
        (),
        "reads",
        "whether a graph can hold the growth of trees",
    ),
    PatchPoint(
        _V2_DRAFT,
        "DraftModelSpeculator.self.attn_cg_support",
        (),
        "reads",
        "whether a graph can hold the growth of trees",
    ),
    PatchPoint(
        "vllm.v1.worker.utils",
        "AttentionGroup.get_metadata_builder",
        (),
        "calls",
        "whether a graph can hold the growth of trees",
    ),
    PatchPoint(
        "vllm.v1.attention.backend",
        "AttentionMetadataBuilder.reorder_batch_threshold",
        (),
        "reads",
        "the longest request that a builder does not take for a prefill",
    ),
    PatchPoint(
        "vllm.v1.worker.utils",
        "AttentionGroup.map_to_kernel_block_table",
        ("block_table",),
        "calls",
        "what vLLM does before it replays draft steps",
    ),
    PatchPoint(
        "vllm.config.compilation",
        "CompilationConfig.max_cudagraph_capture_size",
        (),
        "reads",
        "up to how many requests the target verifies trees in graphs",
    ),
    *(
        PatchPoint(_V2_BATCH, f"InputBatch.{field}", (), "reads", reason)
        for field, reason in (
            ("idx_mapping", "whose trees a batch has"),
            ("num_draft_tokens", "whether a batch has drafts"),
            ("logits_indices", "which tokens are the trees' nodes"),
            ("cu_num_logits", "where each request's nodes begin"),
            ("input_ids", "accepted tokens move to the front"),
            ("positions", "nodes have the positions of their levels"),
            ("seq_lens_cpu_upper_bound", "longest sequence of a batch"),
        )
    ),
    PatchPoint(
        _V2_DRAFT,
        "DraftModelSpeculator.self.idx_mapping",
        (),
        "reads",
        "whose trees are grown, -1 for requests that pad a recorded batch",
    ),
    PatchPoint(
        _V2_DRAFT,
        "DraftModelSpeculator.self.input_buffers",
        (),
        "reads",
        "what passes over levels read",
    ),
    PatchPoint(
        _V2_DRAFT,
        "DraftModelSpeculator.self.draft_tokens",
        (),
        "reads",
        "where vLLM looks for the drafts",
    ),
    PatchPoint(
        _V2_TABLES,
        "BlockTables.self.slot_mappings",
        (),
        "reads",
        "slots of a level's nodes, in memory that graphs know",
    ),
    PatchPoint(
        _V2_TABLES,
        "BlockTables.self.input_block_tables",
        (),
        "reads",
        "what vLLM maps before it replays draft steps",
    ),
)

TREES = PatchGroup(
    name="trees",
    feature="draft trees",
    remedy='leave "tree" out of the speculative config',
    common=_COMMON,
    v1=_V1,
    v2=_V2,
)
