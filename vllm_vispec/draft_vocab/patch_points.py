"""What a draft with a vocabulary of its own touches in vLLM."""

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint

_COMMON = (
    PatchPoint(
        "vllm.model_executor.models.interfaces",
        "LocalArgmaxMixin.get_top_tokens",
        ("hidden_states",),
        "calls",
        "argmax over the draft's own tokens, mapped by draft_id_to_target_id",
    ),
    PatchPoint(
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "ParallelLMHead.__init__",
        ("num_embeddings", "embedding_dim", "params_dtype"),
        "calls",
        "the draft's own lm_head, spread over ranks as the target's",
    ),
    PatchPoint(
        "vllm.model_executor.layers.logits_processor",
        "LogitsProcessor.self.org_vocab_size",
        (),
        "overrides",
        "number of the draft's tokens",
    ),
)

_V1 = (
    PatchPoint(
        "vllm.v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer._greedy_sample",
        ("hidden_states",),
        "reads",
        "asks the draft for tokens if use_local_argmax_reduction is set",
    ),
)

_V2 = (
    PatchPoint(
        "vllm.v1.worker.gpu.spec_decode.speculator",
        "DraftModelSpeculator.sample_draft",
        ("hidden_states", "draft_logits"),
        "reads",
        "asks the draft for tokens if use_local_argmax_reduction is set",
    ),
)

DRAFT_VOCAB = PatchGroup(
    name="draft_vocab",
    feature="draft_vocab",
    remedy='leave "draft_vocab" out of the speculative config',
    common=_COMMON,
    v1=_V1,
    v2=_V2,
)
