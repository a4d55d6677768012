"""Places in vLLM that draft VLMs touch: buffers of hidden states, embedding and lm_head."""

from vllm_vispec.compat.patch_point import PatchPoint

_V1_BASE = "vllm.v1.spec_decode.llm_base_proposer"
_V2_AR = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"
_V2_EAGLE = "vllm.v1.worker.gpu.spec_decode.eagle.utils"
_VOCAB = "vllm.model_executor.layers.vocab_parallel_embedding"

DRAFT_VLM_POINTS: tuple[PatchPoint, ...] = (
    PatchPoint(
        _V1_BASE,
        "SpecDecodeBaseProposer.self.hidden_states",
        (),
        "overrides",
        "V1, draft VLM: has no columns, as such a draft reads no state of the target",
    ),
    PatchPoint(
        _V1_BASE,
        "SpecDecodeBaseProposer.set_inputs_first_pass",
        ("target_hidden_states",),
        "overrides",
        "V1, draft VLM: given by name; no column of the target's states is copied",
    ),
    PatchPoint(
        _V1_BASE,
        "SpecDecodeBaseProposer.self.inputs_embeds_size",
        (),
        "reads",
        "V1, draft VLM: the draft's own width, which need not be the target's",
    ),
    PatchPoint(
        _V1_BASE,
        "SpecDecodeBaseProposer._maybe_share_embeddings",
        ("target_language_model",),
        "reads",
        "V1, draft VLM: keeps its own embedding, as has_own_embed_tokens says",
    ),
    PatchPoint(
        _V1_BASE,
        "SpecDecodeBaseProposer._maybe_share_lm_head",
        ("target_language_model",),
        "reads",
        "V1, draft VLM: keeps its own lm_head, as has_own_lm_head says",
    ),
    PatchPoint(
        _V2_AR,
        "TargetDependentARSpeculator.__init__",
        ("vllm_config", "device"),
        "overrides",
        "V2, draft VLM: its buffer of hidden states is replaced before anything is recorded",
    ),
    PatchPoint(
        _V2_AR,
        "TargetDependentARSpeculator.self.hidden_states",
        (),
        "overrides",
        "V2, draft VLM: has no columns, as such a draft reads no state of the target",
    ),
    PatchPoint(
        _V2_AR,
        "update_draft_inputs",
        ("hidden_states", "next_input_hidden_states"),
        "reads",
        "V2, draft VLM: copies as many columns as the draft's second output has, here none",
    ),
    PatchPoint(
        _V2_EAGLE,
        "_should_share",
        ("eagle", "flag", "draft", "target"),
        "reads",
        "V2, draft VLM: keeps its own embedding and lm_head",
    ),
    PatchPoint(
        _VOCAB,
        "ParallelLMHead.tie_weights",
        ("embed_tokens",),
        "calls",
        "draft VLM: an lm_head that is its embedding table",
    ),
)
