"""Where a draft with a vocabulary of its own touches vLLM; part of `compat.table`."""

from vllm_vispec.compat.patch_point import PatchPoint

DRAFT_VOCAB_POINTS: tuple[PatchPoint, ...] = (
    PatchPoint(
        "vllm.model_executor.models.interfaces",
        "LocalArgmaxMixin.get_top_tokens",
        ("hidden_states",),
        "calls",
        "draft_vocab: argmax over the draft's own tokens, mapped by draft_id_to_target_id",
    ),
    PatchPoint(
        "vllm.model_executor.models.llama",
        "LlamaForCausalLM.compute_logits",
        ("hidden_states",),
        "overrides",
        "draft_vocab: logits of the draft's own tokens among the target's",
    ),
    PatchPoint(
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "ParallelLMHead.__init__",
        ("num_embeddings", "embedding_dim", "params_dtype"),
        "calls",
        "draft_vocab: the draft's own lm_head, spread over ranks as the target's",
    ),
    PatchPoint(
        "vllm.model_executor.layers.logits_processor",
        "LogitsProcessor.self.org_vocab_size",
        (),
        "overrides",
        "draft_vocab: number of the draft's tokens",
    ),
    PatchPoint(
        "vllm.v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer._greedy_sample",
        ("hidden_states",),
        "reads",
        "V1, draft_vocab: asks the draft for tokens if use_local_argmax_reduction is set",
    ),
    PatchPoint(
        "vllm.v1.worker.gpu.spec_decode.speculator",
        "DraftModelSpeculator.sample_draft",
        ("hidden_states", "draft_logits"),
        "reads",
        "V2, draft_vocab: asks the draft for tokens if use_local_argmax_reduction is set",
    ),
)
