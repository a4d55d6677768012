"""What attention heads with more channels than the model's touch in vLLM."""

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint

_LAYER = "vllm.model_executor.layers.attention.attention"
_BACKENDS = "vllm.v1.attention.backends"

_COMMON = (
    PatchPoint(
        "vllm.v1.attention.selector",
        "get_attn_backend",
        ("head_size", "dtype", "kv_cache_dtype", "attn_type"),
        "calls",
        "finds a backend for the padded head size",
    ),
    PatchPoint(
        _LAYER,
        "Attention.__init__",
        (
            "num_heads",
            "head_size",
            "scale",
            "num_kv_heads",
            "cache_config",
            "quant_config",
            "prefix",
            "attn_type",
            "attn_backend",
        ),
        "wraps",
        "its call of the selector is read off and made for padded head sizes; then the layer is "
        "built with the backend found",
    ),
    PatchPoint(
        "vllm.v1.attention.backend",
        "AttentionBackend.supports_head_size",
        ("head_size",),
        "calls",
        "which head sizes a backend serves",
    ),
    PatchPoint(
        "vllm.v1.attention.backend",
        "AttentionBackend.get_impl_cls",
        (),
        "calls",
        "some backends refuse a device or a cache dtype when they are built, and not before",
    ),
    PatchPoint(
        "vllm.v1.kv_cache_interface",
        "get_kv_quant_mode",
        ("kv_cache_dtype",),
        "calls",
        "whether keys and values are quantized; decides the step of head sizes",
    ),
)

_SCRATCH = (
    PatchPoint(
        f"{_BACKENDS}.triton_attn",
        "TritonAttentionMetadataBuilder.__init__",
        ("kv_cache_spec",),
        "wraps",
        "split-K scratch as wide as the layer's heads; vLLM takes the model's",
    ),
    PatchPoint(
        f"{_BACKENDS}.triton_attn",
        "TritonAttentionMetadataBuilder.self.softmax_segm_output",
        (),
        "overrides",
        "that scratch",
    ),
    PatchPoint(
        f"{_BACKENDS}.flashinfer",
        "FlashInferMetadataBuilder.set_workspace_buffer",
        ("workspace_buffer",),
        "wraps",
        "on V2, a layer shares the target's workspace only if that is large enough",
    ),
    PatchPoint(
        f"{_BACKENDS}.flashinfer",
        "FLASHINFER_PREFILL_WORKSPACE_BYTES_PER_ELEM",
        (),
        "reads",
        "how large a workspace vLLM would make",
    ),
)

PADDED_HEADS = PatchGroup(
    name="padded heads",
    feature="attention heads with more channels, of heads that compress images and of draft trees",
    remedy="use a head without image compression, and no tree",
    common=_COMMON,
)

SCRATCH = PatchGroup(
    name="scratch",
    feature="attention heads with more channels on a GPU",
    remedy="use a head without image compression, and no tree",
    common=_SCRATCH,
)
