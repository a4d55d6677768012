"""What draft VLMs touch in vLLM: buffers of hidden states, embedding and lm_head."""

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint
from vllm_vispec.models.uncompressed_patch_points import UNCOMPRESSED

_V1_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer"
_V2_AR = "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator"

_COMMON = (
    PatchPoint(
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "ParallelLMHead.tie_weights",
        ("embed_tokens",),
        "calls",
        "an lm_head that is its embedding table",
    ),
)

_V1 = (
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer.self.hidden_states",
        (),
        "overrides",
        "has no columns, as such a draft reads no state of the target",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer.set_inputs_first_pass",
        ("target_hidden_states",),
        "overrides",
        "given by name; no column of the target's states is copied",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer.self.inputs_embeds_size",
        (),
        "reads",
        "the draft's own width, which need not be the target's",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer._maybe_share_embeddings",
        ("target_language_model",),
        "reads",
        "keeps its own embedding, as has_own_embed_tokens says",
    ),
    PatchPoint(
        _V1_PROPOSER,
        "SpecDecodeBaseProposer._maybe_share_lm_head",
        ("target_language_model",),
        "reads",
        "keeps its own lm_head, as has_own_lm_head says",
    ),
)

_V2 = (
    PatchPoint(
        _V2_AR,
        "TargetDependentARSpeculator.__init__",
        ("vllm_config", "device"),
        "overrides",
        "its buffer of hidden states is replaced before anything is recorded",
    ),
    PatchPoint(
        _V2_AR,
        "TargetDependentARSpeculator.self.hidden_states",
        (),
        "overrides",
        "has no columns, as such a draft reads no state of the target",
    ),
    PatchPoint(
        _V2_AR,
        "update_draft_inputs",
        ("hidden_states", "next_input_hidden_states"),
        "reads",
        "copies as many columns as the draft's second output has, here none",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu.spec_decode.eagle.utils",
        "_should_share",
        ("eagle", "flag", "draft", "target"),
        "reads",
        "keeps its own embedding and lm_head",
    ),
)

DRAFT_VLM = PatchGroup(
    name="draft VLM",
    feature="draft VLMs",
    remedy="use another head",
    common=(*UNCOMPRESSED.common, *_COMMON),
    v1=(*UNCOMPRESSED.v1, *_V1),
    v2=(*UNCOMPRESSED.v2, *_V2),
)
