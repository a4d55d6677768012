"""What heads without compression touch in vLLM: the draft reads the images' embeddings."""

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint

_COMMON = (
    PatchPoint(
        "vllm.model_executor.models.llama",
        "LlamaAttention.__init__",
        ("config", "hidden_size", "num_heads", "num_kv_heads", "bias", "bias_o_proj"),
        "calls",
        "the attention of heads without compression",
    ),
    PatchPoint(
        "vllm.model_executor.models.interfaces",
        "SupportsMultiModalEmbeddings.supports_multimodal_embeddings",
        (),
        "reads",
        "heads without compression say that they take embeddings",
    ),
)

_V1 = (
    PatchPoint(
        "vllm.v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer.build_model_inputs_first_pass",
        ("num_tokens", "num_input_tokens", "mm_embed_inputs"),
        "overrides",
        "image mask where rejected tokens are dropped",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._gather_mm_embeddings",
        ("scheduler_output", "shift_computed_tokens"),
        "reads",
        "embeddings of the tokens one ahead of the target's",
    ),
)

_V2 = (
    PatchPoint(
        "vllm.v1.worker.gpu.mm.encoder_runner",
        "EncoderRunner.gather_mm_embeddings",
        ("draft_lookahead",),
        "reads",
        "embeddings of the tokens one ahead of the target's",
    ),
)

UNCOMPRESSED = PatchGroup(
    name="uncompressed",
    feature="heads without image compression",
    remedy="use a head that compresses images",
    common=_COMMON,
    v1=_V1,
    v2=_V2,
)
