"""What `vispec verify` touches in vLLM beyond its public names and what drafts.

What drafts is looked into as by `vispec bench profile`, whose patch points are checked, too.
"""

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint

VERIFY = PatchGroup(
    name="verify",
    feature="vispec verify",
    remedy="",
    common=(
        PatchPoint(
            "vllm.compilation.cuda_graph",
            "CUDAGraphWrapper.self.concrete_cudagraph_entries",
            (),
            "reads",
            "which CUDA graphs were captured",
        ),
    ),
    v2=(
        PatchPoint(
            "vllm.v1.worker.gpu.model_runner",
            "GPUModelRunner.self.cudagraph_manager",
            (),
            "reads",
            "the target's CUDA graphs",
        ),
        PatchPoint(
            "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator",
            "TargetDependentARSpeculator.self.decode_cudagraph_manager",
            (),
            "reads",
            "the draft's CUDA graphs",
        ),
    ),
)

VERIFY_ATTENTION = PatchGroup(
    name="verify attention",
    feature="the attention check of vispec verify",
    remedy="",
    common=(
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
            "AttentionGroup.build_metadata",
            ("common_attn_metadata",),
            "calls",
            "the layer's metadata",
        ),
    ),
)
