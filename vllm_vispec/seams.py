"""The one table of places where ViSpec touches vLLM.

Each entry names what is touched, the shape it must have, and why.  Entries are checked against
vLLM's *source text*, so checking imports nothing and costs a few tens of milliseconds; that is
how every process can verify all of them when the plugin loads.
"""

from dataclasses import dataclass

from vllm_vispec.seam_source import find_symbol, parameter_names, parse_module

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


@dataclass(frozen=True)
class SeamState:
    """What a check found."""

    seam: Seam
    ok: bool
    detail: str

    @property
    def name(self) -> str:
        """The seam's name."""
        return self.seam.name

    @property
    def reason(self) -> str:
        """Why the seam exists."""
        return self.seam.reason


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


def check_seams(seams: tuple[Seam, ...] = SEAMS) -> list[SeamState]:
    """Check every seam against the installed vLLM."""
    return [_check(seam) for seam in seams]


def first_broken(seams: tuple[Seam, ...] = SEAMS) -> SeamState | None:
    """Return the first seam that does not fit, or None."""
    return next((state for state in check_seams(seams) if not state.ok), None)


def _check(seam: Seam) -> SeamState:
    tree = parse_module(seam.module)
    if tree is None:
        return SeamState(seam, False, f"module {seam.module} not found")
    found = find_symbol(tree, seam.symbol)
    if found is None:
        return SeamState(seam, False, f"{seam.symbol} not found in {seam.module}")
    names = parameter_names(found)
    missing = [name for name in seam.parameters if name not in names]
    if missing:
        return SeamState(seam, False, f"{seam.symbol} has no parameter {missing[0]!r}")
    positions = [names.index(name) for name in seam.parameters]
    if positions != sorted(positions):
        return SeamState(seam, False, f"{seam.symbol} has its parameters in another order")
    return SeamState(seam, True, "as expected")
