"""What drafting a chain touches in vLLM, the base of all drafting."""

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint

_V1_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer"
_V1_RUNNER = "vllm.v1.worker.gpu_model_runner"
_V2_AR = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"
_V2_DRAFT = "vllm.v1.worker.gpu.spec_decode.speculator"
_V2_ENCODER_CACHE = "vllm.v1.worker.gpu.mm.encoder_cache"
_V2_BATCH = "vllm.v1.worker.gpu.input_batch"

_V1 = (
    PatchPoint(
        "vllm.v1.spec_decode.eagle",
        "EagleProposer.__init__",
        ("vllm_config", "device", "runner"),
        "subclasses",
        "V1 runner: EagleProposer(...) builds a ViSpecProposer when the draft is ours",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer.set_inputs_first_pass",
        ("target_token_ids", "next_token_ids", "target_positions", "cad"),
        "overrides",
        "row codes for the first draft pass",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer.self.supports_mm_inputs",
        (),
        "reads",
        "whether vLLM hands the draft the image tokens' embeddings; cleared for ViSpec heads",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer._set_positions",
        ("num_tokens", "positions"),
        "overrides",
        "plain positions for the draft of an M-RoPE target",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer.prepare_inputs",
        ("common_attn_metadata", "sampled_token_ids", "num_draft_tokens"),
        "overrides",
        "which tokens stay when disable_padded_drafter_batch drops the rejected ones",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer._update_positions_dependent_metadata",
        ("positions", "common_attn_metadata", "batch_size", "input_batch_size"),
        "overrides",
        "keep one row code per request for the one-token steps",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer.prepare_next_token_ids_padded",
        ("sampled_token_ids", "requests", "gpu_input_batch", "discard_request_mask"),
        "overrides",
        "right next token at the border of a prompt chunk",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer.load_model",
        ("target_model",),
        "overrides",
        "row table is allocated with the head",
    ),
    PatchPoint(
        _V1_RUNNER,
        "GPUModelRunner.self.encoder_cache",
        (),
        "reads",
        "vision-tower output by item hash",
    ),
    PatchPoint(
        _V1_RUNNER,
        "GPUModelRunner.self.positions",
        (),
        "reads",
        "plain position of every token in the batch",
    ),
    PatchPoint(
        _V1_RUNNER,
        "GPUModelRunner.self.optimistic_seq_lens_cpu",
        (),
        "reads",
        "end of a prompt chunk",
    ),
    PatchPoint(
        _V1_RUNNER,
        "GPUModelRunner.self.discard_request_mask",
        (),
        "reads",
        "which prompts are unfinished",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch.self.num_tokens_no_spec",
        (),
        "reads",
        "where vLLM looks up the next token of an unfinished prompt; changed while it looks",
    ),
    PatchPoint(
        _V1_RUNNER,
        "GPUModelRunner.reset_encoder_cache",
        (),
        "wraps",
        "image rows are dropped with the encoder cache (one object only)",
    ),
    PatchPoint(
        "vllm.v1.sample.rejection_sampler",
        "expand_batch_to_tokens",
        ("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"),
        "wraps",
        "V1 on CPU only: vLLM's CPU kernel leaves the temperatures of sampled requests unset",
    ),
    PatchPoint(
        "vllm._custom_ops",
        "CPUDNNLGEMMHandler.__del__",
        (),
        "wraps",
        "V1 on CPU only: a handler that is collected while a model is traced prints a traceback",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer.self.hidden_states",
        (),
        "reads",
        "the width of what the draft reads of the target's states",
    ),
)

_V2 = (
    PatchPoint(
        "vllm.v1.worker.gpu.spec_decode.eagle.speculator",
        "EagleSpeculator.load_draft_model",
        ("target_model", "target_attn_layer_names"),
        "subclasses",
        "V2 runner: EagleSpeculator(...) builds a ViSpecSpeculator when the draft is ours",
    ),
    PatchPoint(
        _V2_AR,
        "TargetDependentARSpeculator.propose",
        ("input_batch", "attn_metadata", "slot_mappings", "last_hidden_states"),
        "overrides",
        "row codes for the batch",
    ),
    PatchPoint(
        _V2_AR,
        "TargetDependentARSpeculator.init_cudagraph_manager",
        ("cudagraph_mode",),
        "overrides",
        "says so where draft steps are not recorded",
    ),
    PatchPoint(
        _V2_AR,
        "TargetDependentARSpeculator.on_prefill_end",
        ("num_reqs",),
        "overrides",
        "keep one row code per request for the one-token steps",
    ),
    PatchPoint(
        _V2_AR,
        "TargetDependentARSpeculator.self.last_token_indices",
        (),
        "reads",
        "which token of each request is drafted from",
    ),
    PatchPoint(
        _V2_DRAFT,
        "DraftModelSpeculator.set_attn",
        ("model_state",),
        "overrides",
        "finds the encoder cache",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu.model_states.interface",
        "ModelState.self.supports_mm_inputs",
        (),
        "reads",
        "whether there is an encoder cache; none in an engine started for text only",
    ),
    PatchPoint(
        _V2_ENCODER_CACHE,
        "EncoderCache.self.mm_features",
        (),
        "reads",
        "where a request's images lie",
    ),
    PatchPoint(
        _V2_ENCODER_CACHE,
        "EncoderCache.self.encoder_outputs",
        (),
        "reads",
        "vision-tower output by item hash",
    ),
    PatchPoint(
        _V2_ENCODER_CACHE,
        "EncoderCache.reset_encoder_cache",
        (),
        "wraps",
        "image rows are dropped with the encoder cache (one object only)",
    ),
    PatchPoint(
        _V2_AR,
        "TargetDependentARSpeculator.self.hidden_states",
        (),
        "reads",
        "the width of what the draft reads of the target's states",
    ),
    PatchPoint(
        _V2_DRAFT,
        "DraftModelSpeculator.self.supports_mm_inputs",
        (),
        "reads",
        "whether vLLM hands the draft the image tokens' embeddings",
    ),
    *(
        PatchPoint(_V2_BATCH, f"InputBatch.{field}", (), "reads", reason)
        for field, reason in (
            ("req_ids", "whose rows a batch has"),
            ("num_tokens", "rows of a batch"),
            ("num_computed_tokens_np", "where each request's rows begin in its prompt and answer"),
            ("query_start_loc_np", "where each request's rows begin in the batch"),
        )
    ),
)

CHAINS = PatchGroup(
    name="chains",
    feature="ViSpec",
    remedy="",
    v1=_V1,
    v2=_V2,
)
