"""What published models as drafts rely on in vLLM."""

from vllm_vispec.compat.patch_point import PatchGroup, overrides, reads, wraps
from vllm_vispec.config import drafts_with_published

_V2 = "vllm.v1.worker.gpu"

TOWER = wraps(
    "vllm.model_executor.models.interfaces:SupportsMultiModal.embed_multimodal",
    "the draft's tower runs with the target's, its features hang on the target's (one object only)",
)
QUANTISED = wraps(
    "vllm.model_executor.layers.quantization.base_config:QuantizationConfig.get_quant_method"
    "(layer, prefix)",
    "lists of a quantised draft's layers name them without our prefix (one object only)",
)

PUBLISHED = PatchGroup(
    name="draft model",
    feature="published models as drafts",
    remedy="use a head",
    runner="v2",
    is_needed=drafts_with_published,
    points=(
        TOWER,
        QUANTISED,
        overrides(
            f"{_V2}.spec_decode.target_dependent_ar.speculator:TargetDependentARSpeculator"
            "{on_prefill_begin(num_reqs), _prefill(mm_inputs), "
            "init_cudagraph_manager(cudagraph_mode), self.decode_cudagraph_manager, "
            "_generate_draft(num_reqs, num_tokens_padded, attn_metadata, slot_mappings, "
            "num_tokens_across_dp, cudagraph_runtime_mode, num_speculative_steps)}",
            "a first pass over the target's own rows, and one step more than drafts",
        ),
        overrides(
            f"{_V2}.spec_decode.speculator:DraftModelSpeculator"
            "{sample_draft(hidden_states, sample_src_positions, idx_mapping, temperature, seeds, "
            "draft_step), self.num_speculative_steps, self.draft_tokens}",
            "the first pass samples nothing; one column more",
        ),
        reads(
            f"{_V2}.model_states.interface:ModelState.prepare_dummy_inputs(num_reqs, num_tokens)",
            "where the target's M-RoPE positions are kept",
        ),
    ),
)

GROUPS = (PUBLISHED,)
