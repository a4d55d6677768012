"""What published models as drafts rely on in vLLM."""

from vllm_vispec.compat.patch_point import PatchGroup, calls, overrides, reads, wraps
from vllm_vispec.config import drafts_with_published

_SPECULATOR = (
    "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator:TargetDependentARSpeculator"
)

TOWER = (
    wraps(
        "vllm.model_executor.models.interfaces:SupportsMultiModal.embed_multimodal",
        "the draft's tower runs with the target's, its features hang on the target's "
        "(one object only)",
    ),
    calls(
        "vllm.model_executor.model_loader.utils:initialize_model(vllm_config, prefix)",
        "builds the published model inside the draft that vLLM's EAGLE route knows",
    ),
)

PUBLISHED = PatchGroup(
    name="draft model",
    feature="published models as drafts",
    remedy="use a head",
    runner="v2",
    is_needed=drafts_with_published,
    points=(
        *TOWER,
        overrides(
            f"{_SPECULATOR}"
            "{on_prefill_begin(num_reqs), _prefill(mm_inputs), capture, "
            "_generate_fused_drafts(num_reqs, num_speculative_steps), "
            "_generate_draft(num_reqs, num_tokens_padded, attn_metadata, slot_mappings, "
            "num_tokens_across_dp, cudagraph_runtime_mode, num_speculative_steps)}",
            "a first pass over the target's own rows, and one step more than drafts",
        ),
        overrides(
            "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator"
            "{sample_draft(hidden_states, sample_src_positions, idx_mapping, temperature, seeds, "
            "draft_step), self.num_speculative_steps, self.draft_tokens}",
            "the first pass samples nothing; one column more",
        ),
        reads(
            "vllm.v1.worker.gpu.input_batch:InputBatch{input_ids, num_tokens}",
            "the target's rows as they are",
        ),
        wraps(
            "vllm.v1.worker.gpu.model_states.interface:ModelState"
            "{add_request(req_index, new_req_data), remove_request(req_id)}",
            "a prompt's tokens, from which M-RoPE positions are read (one object only)",
        ),
    ),
)

GROUPS = (PUBLISHED,)
