"""Places in vLLM that the first draft pass without unread rows touches."""

from vllm_vispec.compat.patch_point import PatchPoint

_V1_BASE = "vllm.v1.spec_decode.llm_base_proposer"
_V2_AR = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"

FIRST_PASS_POINTS: tuple[PatchPoint, ...] = (
    PatchPoint(
        _V1_BASE,
        "SpecDecodeBaseProposer.build_per_group_and_layer_attn_metadata",
        ("common_attn_metadata", "draft_index"),
        "overrides",
        "V1 on CPU: only the sampled rows of a long first pass ask",
    ),
    PatchPoint(
        _V1_BASE,
        "SpecDecodeBaseProposer.self.token_arange_np",
        (),
        "reads",
        "V1 on CPU: starts of one-token queries, as vLLM's own draft steps have them",
    ),
    PatchPoint(
        _V2_AR,
        "TargetDependentARSpeculator.on_prefill_begin",
        ("num_reqs",),
        "overrides",
        "V2: which rows of the first pass are read",
    ),
    PatchPoint(
        "vllm.model_executor.models.llama",
        "LlamaDecoderLayer.self.mlp",
        (),
        "calls",
        "a first pass runs what follows attention for the sampled rows only",
    ),
    PatchPoint(
        "vllm.model_executor.layers.attention.attention",
        "unified_kv_cache_update",
        ("key", "value", "layer_name"),
        "calls",
        "V1 on CPU, K = 0: keys and values are stored, nothing asks",
    ),
    PatchPoint(
        "vllm.compilation.decorators",
        "support_torch_compile",
        (),
        "reads",
        "`do_not_compile`: passes over text leave operators out only where no graph is recorded",
    ),
)
