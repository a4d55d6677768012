"""What `vispec verify` touches in vLLM; checked when it looks into an engine, or runs a backend."""

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint

_V1_RUNNER = "vllm.v1.worker.gpu_model_runner"
_V1_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer"
_V2_RUNNER = "vllm.v1.worker.gpu.model_runner"
_V2_SPECULATOR = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"

_COMMON = (
    PatchPoint(
        "vllm.config.parallel",
        "ParallelConfig.worker_extension_cls",
        (),
        "reads",
        "--worker-extension-cls adds our methods to the workers",
    ),
    PatchPoint(
        "vllm.compilation.counter",
        "compilation_counter",
        (),
        "reads",
        "what was compiled",
    ),
    PatchPoint(
        "vllm.compilation.cuda_graph",
        "CUDAGraphWrapper.self.concrete_cudagraph_entries",
        (),
        "reads",
        "which CUDA graphs were captured",
    ),
)

_V1 = (
    PatchPoint(
        _V1_RUNNER,
        "GPUModelRunner.execute_model",
        ("scheduler_output",),
        "wraps",
        "target steps",
    ),
    PatchPoint(
        _V1_RUNNER,
        "GPUModelRunner.self.drafter",
        (),
        "reads",
        "what drafts",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer.propose",
        (),
        "wraps",
        "all of drafting",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer._sample_draft_tokens",
        ("hidden_states",),
        "wraps",
        "where the first pass ends",
    ),
)

_V2 = (
    PatchPoint(
        _V2_RUNNER,
        "GPUModelRunner.execute_model",
        ("scheduler_output",),
        "wraps",
        "target steps",
    ),
    PatchPoint(
        _V2_RUNNER,
        "GPUModelRunner.self.speculator",
        (),
        "reads",
        "what drafts",
    ),
    PatchPoint(
        _V2_RUNNER,
        "GPUModelRunner.self.cudagraph_manager",
        (),
        "reads",
        "the target's CUDA graphs",
    ),
    PatchPoint(
        _V2_SPECULATOR,
        "TargetDependentARSpeculator.propose",
        (),
        "wraps",
        "all of drafting",
    ),
    PatchPoint(
        _V2_SPECULATOR,
        "TargetDependentARSpeculator.on_prefill_end",
        ("num_reqs",),
        "wraps",
        "where the first pass ends",
    ),
    PatchPoint(
        _V2_SPECULATOR,
        "TargetDependentARSpeculator.self.decode_cudagraph_manager",
        (),
        "reads",
        "the draft's CUDA graphs",
    ),
)

_ATTENTION = (
    PatchPoint(
        "vllm.model_executor.layers.attention.attention",
        "Attention.__init__",
        ("num_heads", "head_size", "scale", "num_kv_heads", "attn_backend"),
        "calls",
        "a layer of each backend",
    ),
    PatchPoint(
        "vllm.v1.attention.backend",
        "AttentionBackend.validate_configuration",
        (),
        "calls",
        "whether a backend is available",
    ),
    PatchPoint(
        "vllm.v1.attention.backends.utils",
        "get_supported_kv_cache_layouts",
        ("backends",),
        "calls",
        "layout of the layer's KV cache",
    ),
    PatchPoint(
        "vllm.v1.kv_cache_interface",
        "create_kv_cache_views",
        ("raw", "spec", "num_blocks", "layout", "kv_cache_tensor"),
        "calls",
        "the layer's KV cache",
    ),
    PatchPoint(
        "vllm.v1.worker.utils",
        "AttentionGroup.create_metadata_builders",
        ("vllm_config", "device"),
        "calls",
        "the layer's metadata builder",
    ),
    PatchPoint(
        "vllm.v1.worker.utils",
        "AttentionGroup.build_metadata",
        ("common_attn_metadata",),
        "calls",
        "the layer's metadata",
    ),
    PatchPoint(
        "vllm.forward_context",
        "set_forward_context",
        ("attn_metadata", "vllm_config", "num_tokens", "slot_mapping"),
        "calls",
        "runs the layer as a model does",
    ),
)

VERIFY = PatchGroup(
    name="verify",
    feature="vispec verify",
    remedy="",
    common=_COMMON,
    v1=_V1,
    v2=_V2,
)

VERIFY_ATTENTION = PatchGroup(
    name="verify attention",
    feature="the attention check of vispec verify",
    remedy="",
    common=_ATTENTION,
)
