"""Places in vLLM that draft trees touch."""

from vllm_vispec.seam_entry import Seam

_ATTENTION = "vllm.model_executor.layers.attention.attention"
_V1_BASE = "vllm.v1.spec_decode.llm_base_proposer"
_V1_RUNNER = "vllm.v1.worker.gpu_model_runner"
_V1_SAMPLER = "vllm.v1.sample.rejection_sampler"

TREE_SEAMS: tuple[Seam, ...] = (
    Seam(
        "vllm.config.vllm",
        "VllmConfig.num_lookahead_tokens",
        (),
        "wraps",
        "trees: KV slots for the draft passes over a tree",
    ),
    Seam(
        _ATTENTION,
        "Attention.__init__",
        ("num_heads", "head_size", "scale", "alibi_slopes", "cache_config", "logits_soft_cap"),
        "wraps",
        "trees: heads a few channels wider, in engines with trees alone",
    ),
    Seam(
        _ATTENTION,
        "Attention.get_kv_cache_spec",
        ("vllm_config",),
        "wraps",
        "trees: the KV cache has the padded head size",
    ),
    Seam(
        _ATTENTION,
        "Attention.self.impl",
        (),
        "subclasses",
        "trees: the backend's implementation pads what comes in and cuts what goes out",
    ),
    Seam(
        _ATTENTION,
        "get_attention_context",
        ("layer_name",),
        "reads",
        "trees: layers store into `kv_cache` of their own",
    ),
    Seam(
        "vllm.v1.attention.backend",
        "AttentionBackend.forward_includes_kv_cache_update",
        (),
        "reads",
        "trees: backends that store keys while they attend are refused",
    ),
    Seam(
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionBackendImpl.do_kv_cache_update",
        ("layer", "key", "value", "kv_cache", "slot_mapping"),
        "calls",
        "trees: accepted keys and values are stored again; -1 skips",
    ),
    Seam(
        "vllm.forward_context",
        "ForwardContext.slot_mapping",
        (),
        "reads",
        "trees: where each layer stored the batch",
    ),
    Seam(
        _V1_BASE,
        "SpecDecodeBaseProposer.propose",
        ("num_speculative_tokens", "common_attn_metadata"),
        "overrides",
        "V1, trees: one pass for each level behind vLLM's first pass",
    ),
    Seam(
        _V1_BASE,
        "SpecDecodeBaseProposer._sample_draft_tokens",
        ("hidden_states", "sampling_metadata"),
        "overrides",
        "V1, trees: hidden states behind the roots",
    ),
    Seam(
        _V1_BASE,
        "SpecDecodeBaseProposer._determine_batch_execution_and_padding",
        ("num_tokens",),
        "calls",
        "V1, trees: passes over levels",
    ),
    Seam(
        _V1_BASE,
        "SpecDecodeBaseProposer._get_slot_mapping",
        ("num_tokens", "slot_mapping"),
        "calls",
        "V1, trees: passes over levels",
    ),
    Seam(
        _V1_BASE,
        "SpecDecodeBaseProposer.self._draft_attn_layer_names",
        (),
        "reads",
        "V1, trees: keys of the target's layers alone are stored again",
    ),
    Seam(
        _V1_RUNNER,
        "GPUModelRunner._calc_spec_decode_metadata",
        ("num_draft_tokens", "cu_num_scheduled_tokens"),
        "wraps",
        "V1, trees: which requests of a batch have drafts (one object only)",
    ),
    Seam(
        _V1_RUNNER,
        "GPUModelRunner._model_forward",
        ("input_ids", "positions"),
        "wraps",
        "V1, trees: positions by level, and codes (one object only)",
    ),
    Seam(
        _V1_RUNNER,
        "GPUModelRunner._get_draft_token_ids_cpu",
        (),
        "wraps",
        "V1, trees: empty places are no drafts (one object only)",
    ),
    Seam(
        _V1_RUNNER,
        "GPUModelRunner.self.rejection_sampler",
        (),
        "subclasses",
        "V1, trees: the walk along the target's own samples",
    ),
    Seam(
        _V1_SAMPLER,
        "RejectionSampler.forward",
        ("metadata", "draft_probs", "logits", "sampling_metadata"),
        "overrides",
        "V1, trees: the walk along the target's own samples",
    ),
    Seam(
        _V1_SAMPLER,
        "RejectionSampler.apply_logits_processors",
        ("logits", "sampling_metadata", "metadata"),
        "calls",
        "V1, trees: for every row of logits, the last ones included",
    ),
    Seam(
        _V1_SAMPLER,
        "RejectionSampler._get_logprobs_tensors",
        ("max_num_logprobs", "metadata", "logits", "target_logits", "bonus_logits"),
        "calls",
        "V1, trees: logprobs of the accepted paths",
    ),
    Seam(
        _V1_SAMPLER,
        "apply_sampling_constraints",
        ("logits", "cu_num_draft_tokens", "sampling_metadata"),
        "calls",
        "V1, trees: temperature, top_k and top_p for every row of logits",
    ),
)
