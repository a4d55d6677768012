"""The one table of places where ViSpec touches vLLM.

Each entry names what is touched, the shape it must have, and why.
"""

from dataclasses import dataclass

VERSIONS = ("0.32", "0.33")


@dataclass(frozen=True)
class Seam:
    """One thing in vLLM that ViSpec calls, overrides or reads.

    Attributes:
        module: Dotted module, e.g. ``vllm.engine.arg_utils``.
        symbol: ``name``, ``Class``, ``Class.method`` or, with ``self.`` inside, an attribute that
            the class must set.
        parameters: Parameters that must exist, in this order, ``self`` left out.  Others may
            follow or stand between.
        use: ``wraps``, ``overrides``, ``subclasses``, ``calls`` or ``reads``.
        reason: Why it is touched.
        versions: vLLM releases it was verified on.
    """

    module: str
    symbol: str
    parameters: tuple[str, ...]
    use: str
    reason: str
    versions: tuple[str, ...] = VERSIONS

    @property
    def name(self) -> str:
        """``module:symbol``, as shown to users."""
        return f"{self.module}:{self.symbol}"


_V1_BASE = "vllm.v1.spec_decode.llm_base_proposer"
_V2_AR = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"

SEAMS: tuple[Seam, ...] = (
    Seam(
        "vllm.engine.arg_utils",
        "EngineArgs.create_speculative_config",
        ("target_model_config", "target_parallel_config"),
        "wraps",
        'accepts "method": "vispec", checks the head against the target',
    ),
    Seam(
        "vllm.transformers_utils.config",
        "maybe_override_with_speculators",
        ("model", "tokenizer", "vllm_speculative_config", "hf_token"),
        "wraps",
        "`vllm serve HEAD`: finds the target a head names (wrapped in `vllm.engine.arg_utils`)",
    ),
    Seam(
        "vllm.transformers_utils.config",
        "_CONFIG_FORMAT_TO_CONFIG_PARSER",
        (),
        "wraps",
        "reads a head's config.json, which calls itself a VLM; swapped only while a head is read",
    ),
    Seam(
        "vllm.transformers_utils.config",
        "HFConfigParser.parse",
        ("model", "trust_remote_code", "revision"),
        "overrides",
        "returns the head's configuration as a plain LlamaConfig",
    ),
    Seam(
        "vllm.v1.worker.worker_base",
        "WorkerBase.__init__",
        ("vllm_config",),
        "wraps",
        "first moment in a worker at which the configuration is known and no runner exists",
    ),
    Seam(
        "vllm.v1.spec_decode.eagle",
        "EagleProposer.__init__",
        ("vllm_config", "device", "runner"),
        "subclasses",
        "V1 runner: EagleProposer(...) builds a ViSpecProposer when the draft is ours",
    ),
    Seam(
        _V1_BASE,
        "SpecDecodeBaseProposer.set_inputs_first_pass",
        ("target_token_ids", "next_token_ids", "target_positions", "cad"),
        "overrides",
        "V1: row codes for the first draft pass",
    ),
    Seam(
        _V1_BASE,
        "SpecDecodeBaseProposer.build_model_inputs_first_pass",
        ("num_tokens", "num_input_tokens", "mm_embed_inputs"),
        "overrides",
        "V1, heads without compression: image mask where rejected tokens are dropped",
    ),
    Seam(
        _V1_BASE,
        "SpecDecodeBaseProposer.self.supports_mm_inputs",
        (),
        "reads",
        "V1: whether vLLM hands the draft the image tokens' embeddings; cleared for ViSpec heads",
    ),
    Seam(
        _V1_BASE,
        "SpecDecodeBaseProposer._set_positions",
        ("num_tokens", "positions"),
        "overrides",
        "V1: plain positions for the draft of an M-RoPE target",
    ),
    Seam(
        _V1_BASE,
        "SpecDecodeBaseProposer.prepare_inputs",
        ("common_attn_metadata", "sampled_token_ids", "num_draft_tokens"),
        "overrides",
        "V1: which tokens stay when disable_padded_drafter_batch drops the rejected ones",
    ),
    Seam(
        _V1_BASE,
        "SpecDecodeBaseProposer._update_positions_dependent_metadata",
        ("positions", "common_attn_metadata", "batch_size", "input_batch_size"),
        "overrides",
        "V1: keep one row code per request for the one-token steps",
    ),
    Seam(
        _V1_BASE,
        "SpecDecodeBaseProposer.prepare_next_token_ids_padded",
        ("sampled_token_ids", "requests", "gpu_input_batch", "discard_request_mask"),
        "overrides",
        "V1: right next token at the border of a prompt chunk",
    ),
    Seam(
        _V1_BASE,
        "SpecDecodeBaseProposer.load_model",
        ("target_model",),
        "overrides",
        "V1: row table is allocated with the head",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._gather_mm_embeddings",
        ("scheduler_output", "shift_computed_tokens"),
        "reads",
        "V1, heads without compression: embeddings of the tokens one ahead of the target's",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.self.encoder_cache",
        (),
        "reads",
        "V1: vision-tower output by item hash",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.self.positions",
        (),
        "reads",
        "V1: plain position of every token in the batch",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.self.optimistic_seq_lens_cpu",
        (),
        "reads",
        "V1: end of a prompt chunk",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.self.discard_request_mask",
        (),
        "reads",
        "V1: which prompts are unfinished",
    ),
    Seam(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.reset_encoder_cache",
        (),
        "wraps",
        "V1: image rows are dropped with the encoder cache (one object only)",
    ),
    Seam(
        "vllm.v1.sample.rejection_sampler",
        "expand_batch_to_tokens",
        ("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"),
        "wraps",
        "V1 on CPU only: vLLM's CPU kernel leaves the temperatures of sampled requests unset",
    ),
    Seam(
        "vllm.v1.worker.gpu.spec_decode.eagle.speculator",
        "EagleSpeculator.load_draft_model",
        ("target_model", "target_attn_layer_names"),
        "subclasses",
        "V2 runner: EagleSpeculator(...) builds a ViSpecSpeculator when the draft is ours",
    ),
    Seam(
        _V2_AR,
        "TargetDependentARSpeculator.propose",
        ("input_batch",),
        "overrides",
        "V2: row codes for the batch",
    ),
    Seam(
        _V2_AR,
        "TargetDependentARSpeculator.on_prefill_end",
        ("num_reqs",),
        "overrides",
        "V2: keep one row code per request for the one-token steps",
    ),
    Seam(
        _V2_AR,
        "TargetDependentARSpeculator.self.last_token_indices",
        (),
        "reads",
        "V2: which token of each request is drafted from",
    ),
    Seam(
        "vllm.v1.worker.gpu.spec_decode.speculator",
        "DraftModelSpeculator.set_attn",
        ("model_state",),
        "overrides",
        "V2: finds the encoder cache",
    ),
    Seam(
        "vllm.v1.worker.gpu.mm.encoder_runner",
        "EncoderRunner.gather_mm_embeddings",
        ("draft_lookahead",),
        "reads",
        "V2, heads without compression: embeddings of the tokens one ahead of the target's",
    ),
    Seam(
        "vllm.v1.worker.gpu.mm.encoder_cache",
        "EncoderCache.self.mm_features",
        (),
        "reads",
        "V2: where a request's images lie",
    ),
    Seam(
        "vllm.v1.worker.gpu.mm.encoder_cache",
        "EncoderCache.self.encoder_outputs",
        (),
        "reads",
        "V2: vision-tower output by item hash",
    ),
    Seam(
        "vllm.v1.worker.gpu.mm.encoder_cache",
        "EncoderCache.reset_encoder_cache",
        (),
        "wraps",
        "V2: image rows are dropped with the encoder cache (one object only)",
    ),
    Seam(
        "vllm.multimodal.inputs",
        "PlaceholderRange.extract_embeds_range",
        (),
        "calls",
        "which prompt positions hold vision embeddings",
    ),
    Seam(
        "vllm.model_executor.models.llama",
        "LlamaDecoderLayer.__init__",
        ("vllm_config", "prefix", "config", "attn_layer_type"),
        "subclasses",
        "the draft's decoder layer takes our attention",
    ),
    Seam(
        "vllm.model_executor.models.llama",
        "LlamaAttention.__init__",
        ("config", "hidden_size", "num_heads", "num_kv_heads", "bias", "bias_o_proj"),
        "calls",
        "the attention of heads without compression",
    ),
    Seam(
        "vllm.model_executor.models.interfaces",
        "SupportsMultiModalEmbeddings.supports_multimodal_embeddings",
        (),
        "reads",
        "heads without compression say that they take embeddings",
    ),
    Seam(
        "vllm.model_executor.models.llama_eagle",
        "EagleLlamaForCausalLM.forward",
        ("input_ids", "positions", "hidden_states"),
        "subclasses",
        "the draft model's interface",
    ),
    Seam(
        "vllm.v1.attention.selector",
        "get_attn_backend",
        ("head_size", "dtype", "kv_cache_dtype", "attn_type"),
        "calls",
        "finds a backend for the padded head size",
    ),
)
