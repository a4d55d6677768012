"""What the V1 model runner's part of ViSpec relies on in vLLM."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm_vispec.compat.patch_point import (
    PatchGroup,
    calls,
    no_patches,
    overrides,
    reads,
    subclasses,
    wraps,
)
from vllm_vispec.compat.patching import patch
from vllm_vispec.config import drafts_with_published, uses_vispec
from vllm_vispec.draft_model.patch_points import PUBLISHED, QUANTISED, TOWER
from vllm_vispec.draft_vlm.patch_points import DRAFT_VLM
from vllm_vispec.draft_vocab.patch_points import DRAFT_VOCAB
from vllm_vispec.models.patch_points import UNCOMPRESSED
from vllm_vispec.trees.limits import has_tree
from vllm_vispec.trees.patch_points import V2_TREES

_V1_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer"
_V1_RUNNER = "vllm.v1.worker.gpu_model_runner"
_V1_SAMPLER = "vllm.v1.sample.rejection_sampler"
_PROPOSER = f"{_V1_PROPOSER}:SpecDecodeBaseProposer"
_RUNNER = f"{_V1_RUNNER}:GPUModelRunner"


def _apply_chains() -> None:
    """Let `EagleProposer(...)` build our proposer where the draft is a ViSpec head."""
    from vllm.platforms import current_platform
    from vllm.v1.spec_decode.eagle import EagleProposer

    patch(EagleProposer, "__new__", _new_proposer)
    if current_platform.is_cpu():
        apply_cpu_repairs()


def apply_cpu_repairs() -> None:
    """Mend two faults of vLLM's on CPUs: temperatures are not set, and what is released prints."""
    from vllm._custom_ops import CPUDNNLGEMMHandler
    from vllm.v1.sample import rejection_sampler

    from vllm_vispec.v1 import cpu_repairs

    patch(rejection_sampler, "expand_batch_to_tokens", cpu_repairs.expand_batch_to_tokens)
    patch(CPUDNNLGEMMHandler, "__del__", cpu_repairs.release_gemm)


def _new_proposer(
    original: Callable[..., Any], base: type, vllm_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Stands for ``EagleProposer.__new__``: the runner tests the drafter's class by name."""
    is_ours = base.__name__ == "EagleProposer" and uses_vispec(vllm_config)
    return original(proposer_class(vllm_config) if is_ours else base)


def proposer_class(vllm_config: Any) -> type:
    """Return the class of what drafts in an engine with a ViSpec head."""
    if drafts_with_published(vllm_config):
        from vllm_vispec.v1.published_proposer import PublishedProposer, PublishedTreeProposer

        return PublishedTreeProposer if has_tree(vllm_config) else PublishedProposer
    if has_tree(vllm_config):
        from vllm_vispec.v1.tree_proposer import TreeProposer

        return TreeProposer
    from vllm_vispec.v1.proposer import ViSpecProposer

    return ViSpecProposer


CHAINS = PatchGroup(
    name="chains",
    feature="ViSpec",
    remedy="",
    runner="v1",
    is_needed=uses_vispec,
    apply=_apply_chains,
    points=(
        subclasses(
            "vllm.v1.spec_decode.eagle:EagleProposer.__init__(vllm_config, device, runner)",
            "EagleProposer(...) builds a ViSpecProposer when the draft is ours",
        ),
        overrides(
            f"{_PROPOSER}"
            "{propose(num_speculative_tokens, target_token_ids, next_token_ids), "
            "set_inputs_first_pass"
            "(target_token_ids, next_token_ids, target_positions, target_hidden_states, cad), "
            "_set_positions(num_tokens, positions), "
            "_update_positions_dependent_metadata"
            "(positions, common_attn_metadata, batch_size, input_batch_size)}",
            "row ids for the first draft pass, one per request for the one-token steps; states as "
            "wide as the draft reads; plain positions for the draft of an M-RoPE target",
        ),
        overrides(
            f"{_PROPOSER}"
            "{prepare_inputs(common_attn_metadata, sampled_token_ids, num_draft_tokens), "
            "prepare_next_token_ids_padded"
            "(sampled_token_ids, requests, gpu_input_batch, discard_request_mask)}",
            "which tokens stay when disable_padded_drafter_batch drops the rejected ones; right "
            "next token at the border of a prompt chunk",
        ),
        overrides(
            f"{_PROPOSER}"
            "{load_model(target_model), self.supports_mm_inputs, self.hidden_states, "
            "self.inputs_embeds_size}",
            "row table is allocated with the head; no embeddings for heads that compress images; "
            "how wide what the draft reads is",
        ),
        reads(
            f"{_RUNNER}"
            "{self.encoder_cache, self.positions, self.optimistic_seq_lens_cpu, "
            "self.discard_request_mask}",
            "the vision tower's output; plain positions; ends of chunks of unfinished prompts",
        ),
        reads(
            "vllm.v1.worker.gpu_input_batch:InputBatch"
            "{self.num_tokens_no_spec, self.num_prompt_tokens}",
            "where vLLM looks up the next token of an unfinished prompt, changed while it looks; "
            "where a prompt ends",
        ),
        wraps(
            f"{_RUNNER}.reset_encoder_cache",
            "image rows are dropped with the encoder cache (one object only)",
        ),
        wraps(
            f"{_V1_SAMPLER}:expand_batch_to_tokens"
            "(x, cu_num_tokens, num_tokens, replace_from, replace_to)",
            "on CPUs vLLM's kernel leaves the temperatures of sampled requests unset",
        ),
        wraps(
            "vllm._custom_ops:CPUDNNLGEMMHandler.__del__",
            "on CPUs a handler that is collected while a model is traced prints a traceback",
        ),
    ),
)

_UNCOMPRESSED = replace(
    UNCOMPRESSED,
    runner="v1",
    points=(
        overrides(
            f"{_PROPOSER}.build_model_inputs_first_pass"
            "(num_tokens, num_input_tokens, mm_embed_inputs)",
            "image mask where rejected tokens are dropped",
        ),
        reads(
            f"{_RUNNER}._gather_mm_embeddings(scheduler_output, shift_computed_tokens)",
            "embeddings of the tokens one ahead of the target's",
        ),
    ),
)

_DRAFT_VLM = replace(
    DRAFT_VLM,
    runner="v1",
    points=(
        reads(
            f"{_PROPOSER}"
            "{_maybe_share_embeddings(target_language_model), "
            "_maybe_share_lm_head(target_language_model)}",
            "keeps its own embedding and lm_head, as has_own_embed_tokens and has_own_lm_head say",
        ),
    ),
)

_PUBLISHED = replace(
    PUBLISHED,
    runner="v1",
    points=(
        TOWER,
        QUANTISED,
        overrides(
            f"{_PROPOSER}"
            "{dummy_run(num_tokens), propose(num_speculative_tokens), "
            "_sample_draft_tokens(hidden_states, sampling_metadata), "
            "_maybe_share_embeddings(target_language_model), "
            "_maybe_share_lm_head(target_language_model), self._last_draft_probs}",
            "a first pass over the target's own rows, and one step more; shares nothing",
        ),
    ),
)

_DRAFT_VOCAB = replace(
    DRAFT_VOCAB,
    runner="v1",
    points=(
        reads(
            f"{_PROPOSER}._greedy_sample(hidden_states)",
            "asks the draft for tokens if use_local_argmax_reduction is set",
        ),
    ),
)

_TREES = replace(
    V2_TREES,
    runner="v1",
    is_needed=has_tree,
    apply=no_patches,
    points=(
        subclasses(
            f"{_PROPOSER}"
            "{build_per_group_and_layer_attn_metadata(common_attn_metadata, draft_index), "
            "propose(num_speculative_tokens, common_attn_metadata), "
            "_sample_draft_tokens(hidden_states, sampling_metadata), "
            "_determine_batch_execution_and_padding(num_tokens), "
            "_get_slot_mapping(num_tokens, slot_mapping)}",
            "one pass for each level behind vLLM's first pass",
        ),
        wraps(
            f"{_RUNNER}"
            "{_calc_spec_decode_metadata(num_draft_tokens, cu_num_scheduled_tokens), "
            "_model_forward(input_ids, positions), _get_draft_token_ids_cpu, "
            "_input_fits_in_drafter(common_attn_metadata), self.rejection_sampler}",
            "positions by level, codes, empty places, and who verifies (one object only)",
        ),
        subclasses(
            f"{_V1_SAMPLER}:RejectionSampler"
            "{forward(metadata, draft_probs, logits, sampling_metadata), "
            "apply_logits_processors(logits, sampling_metadata, metadata), "
            "_get_logprobs_tensors(max_num_logprobs, metadata, logits, target_logits, "
            "bonus_logits)}",
            "the target's token behind every node, and log probabilities of the accepted paths",
        ),
        calls(
            f"{_V1_SAMPLER}:apply_sampling_constraints"
            "(logits, cu_num_draft_tokens, sampling_metadata)",
            "temperature, top_k and top_p for every row of logits",
        ),
        reads(
            "vllm.forward_context:ForwardContext.slot_mapping", "where each layer stored the batch"
        ),
    ),
)

GROUPS = (CHAINS, _UNCOMPRESSED, _DRAFT_VLM, _PUBLISHED, _DRAFT_VOCAB, _TREES)
