"""Where `vispec verify` touches vLLM: in the workers of engines, and to run one attention layer."""

from vllm_vispec.compat.patch_point import PatchPoint

_V1, _V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"
_V1_DRAFT = "vllm.v1.spec_decode.llm_base_proposer"
_V2_AR = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"
_BACKEND, _KV_CACHE = "vllm.v1.attention.backend", "vllm.v1.kv_cache_interface"

WORKER_POINTS: tuple[PatchPoint, ...] = tuple(
    PatchPoint(*point)
    for point in (
        (
            "vllm.config.parallel",
            "ParallelConfig.worker_extension_cls",
            (),
            "reads",
            "adds our methods to the workers",
        ),
        ("vllm.config.vllm", "VllmConfig.use_v2_model_runner", (), "reads", "which model runner"),
        ("vllm.compilation.counter", "compilation_counter", (), "reads", "what was compiled"),
        (
            "vllm.compilation.cuda_graph",
            "CUDAGraphWrapper.self.concrete_cudagraph_entries",
            (),
            "reads",
            "which graphs were captured",
        ),
        (_V1, "GPUModelRunner.execute_model", ("scheduler_output",), "wraps", "V1: target steps"),
        (_V1, "GPUModelRunner.self.drafter", (), "reads", "V1: what drafts"),
        (_V1_DRAFT, "SpecDecodeBaseProposer.propose", (), "wraps", "V1: all of drafting"),
        (
            _V1_DRAFT,
            "SpecDecodeBaseProposer._sample_draft_tokens",
            ("hidden_states",),
            "wraps",
            "V1: where the first pass ends",
        ),
        (_V2, "GPUModelRunner.execute_model", ("scheduler_output",), "wraps", "V2: target steps"),
        (_V2, "GPUModelRunner.self.speculator", (), "reads", "V2: what drafts"),
        (_V2, "GPUModelRunner.self.cudagraph_manager", (), "reads", "V2: the target's graphs"),
        (_V2_AR, "TargetDependentARSpeculator.propose", (), "wraps", "V2: all of drafting"),
        (
            _V2_AR,
            "TargetDependentARSpeculator.on_prefill_end",
            ("num_reqs",),
            "wraps",
            "V2: where the first pass ends",
        ),
        (
            _V2_AR,
            "TargetDependentARSpeculator.self.decode_cudagraph_manager",
            (),
            "reads",
            "V2: the draft's graphs",
        ),
    )
)
ATTENTION_POINTS: tuple[PatchPoint, ...] = tuple(
    PatchPoint(*point)
    for point in (
        (
            "vllm.model_executor.layers.attention.attention",
            "Attention.__init__",
            ("num_heads", "head_size", "scale", "num_kv_heads", "attn_backend"),
            "calls",
            "a layer for each backend",
        ),
        (_BACKEND, "AttentionBackend.validate_configuration", (), "calls", "is it available"),
        (_BACKEND, "AttentionBackend.get_preferred_block_size", (), "calls", "KV blocks"),
        (
            "vllm.v1.attention.backends.utils",
            "get_supported_kv_cache_layouts",
            ("backends",),
            "calls",
            "the KV cache's layout",
        ),
        (
            _KV_CACHE,
            "create_kv_cache_views",
            ("raw", "spec", "num_blocks", "layout", "kv_cache_tensor"),
            "calls",
            "the layer's KV cache",
        ),
        (
            "vllm.v1.worker.utils",
            "AttentionGroup.create_metadata_builders",
            ("vllm_config", "device"),
            "calls",
            "the layer's metadata builder",
        ),
        (
            "vllm.v1.worker.utils",
            "AttentionGroup.build_metadata",
            ("common_attn_metadata",),
            "calls",
            "the layer's metadata",
        ),
        (
            "vllm.forward_context",
            "set_forward_context",
            ("attn_metadata", "vllm_config", "num_tokens", "slot_mapping"),
            "calls",
            "runs the layer as a model does",
        ),
    )
)
