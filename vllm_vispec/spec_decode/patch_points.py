"""What ViSpec relies on in vLLM: in every engine, for chains, and for adaptive verification."""

from collections.abc import Callable
from typing import Any

from vllm_vispec.compat.patch_point import PatchGroup, overrides, reads, subclasses, wraps
from vllm_vispec.compat.patching import patch
from vllm_vispec.config import drafts_with_published, trims_drafts, uses_vispec
from vllm_vispec.trees.limits import has_branches, has_paths

_ARGS = "vllm.engine.arg_utils:EngineArgs"
_BATCH = "vllm.v1.worker.gpu.input_batch:InputBatch"
_ENCODER_CACHE = "vllm.v1.worker.gpu.mm.encoder_cache:EncoderCache"
_SPECULATOR = (
    "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator:TargetDependentARSpeculator"
)

CORE = PatchGroup(
    name="core",
    feature="ViSpec",
    remedy="",
    is_needed=uses_vispec,
    points=(
        wraps(
            f"{_ARGS}.create_speculative_config(target_model_config, target_parallel_config)",
            'accepts "method": "vispec", checks the head against the target',
        ),
        wraps(
            f"{_ARGS}.create_engine_config(usage_context)",
            "checks what only the finished configuration tells, before any other process starts",
        ),
        reads(
            "vllm.config.model:ModelConfig.config_format",
            "vLLM reads the draft's configuration in the target's format; ours is registered",
        ),
        wraps(
            "vllm.v1.worker.worker_base:WorkerBase.__init__(vllm_config)",
            "first moment in a worker at which the configuration is known and no runner exists",
        ),
        subclasses(
            "vllm.model_executor.models.llama:LlamaDecoderLayer.__init__"
            "(vllm_config, prefix, config, attn_layer_type)",
            "the draft's decoder layer takes our attention",
        ),
        subclasses(
            "vllm.model_executor.models.llama_eagle:EagleLlamaForCausalLM.forward"
            "(input_ids, positions, hidden_states)",
            "the draft model's interface",
        ),
    ),
)


def _apply_chains() -> None:
    """Let `EagleSpeculator(...)` build our speculator where the draft is a ViSpec head."""
    from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator

    patch(EagleSpeculator, "__new__", _new_speculator)


def _new_speculator(
    original: Callable[..., Any], base: type, vllm_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Stands for ``EagleSpeculator.__new__``: vLLM chooses a speculator's class by method alone."""
    is_ours = base.__name__ == "EagleSpeculator" and uses_vispec(vllm_config)
    return original(speculator_class(vllm_config) if is_ours else base)


def speculator_class(vllm_config: Any) -> type:
    """Return the class of what drafts in an engine with a ViSpec head."""
    if drafts_with_published(vllm_config):
        from vllm_vispec.draft_model import speculator

        if has_branches(vllm_config):
            return speculator.PublishedTreeSpeculator
        paths = has_paths(vllm_config)
        return speculator.PublishedPathSpeculator if paths else speculator.PublishedSpeculator
    if has_branches(vllm_config):
        from vllm_vispec.trees.speculator import TreeSpeculator

        return TreeSpeculator
    if has_paths(vllm_config):
        from vllm_vispec.trees.paths import PathSpeculator

        return PathSpeculator
    from vllm_vispec.spec_decode.speculator import ViSpecSpeculator

    return ViSpecSpeculator


CHAINS = PatchGroup(
    name="chains",
    feature="ViSpec",
    remedy="",
    runner="v2",
    is_needed=uses_vispec,
    apply=_apply_chains,
    points=(
        subclasses(
            "vllm.v1.worker.gpu.spec_decode.eagle.speculator:EagleSpeculator.load_draft_model"
            "(target_model, target_attn_layer_names)",
            "EagleSpeculator(...) builds a ViSpecSpeculator when the draft is ours",
        ),
        overrides(
            f"{_SPECULATOR}"
            "{propose(input_batch, attn_metadata, slot_mappings, last_hidden_states), "
            "on_prefill_end(num_reqs), init_cudagraph_manager(cudagraph_mode), "
            "self.last_token_indices, self.hidden_states}",
            "row ids for the batch, one per request for the one-token steps; says so where draft "
            "steps are not recorded; which token of each request is drafted from, and the width "
            "of what the draft reads of the target's states",
        ),
        overrides(
            "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator"
            "{set_attn(model_state), self.supports_mm_inputs}",
            "finds the encoder cache; whether vLLM hands the draft the image tokens' embeddings",
        ),
        reads(
            "vllm.v1.worker.gpu.model_states.interface:ModelState"
            "{self.supports_mm_inputs, self.encoder_cache}",
            "the encoder cache; there is none in an engine started for text only",
        ),
        wraps(
            f"{_ENCODER_CACHE}{{reset_encoder_cache, self.mm_features, self.encoder_outputs}}",
            "image rows are dropped with the encoder cache (one object only); where a request's "
            "images lie, and the vision tower's output by item hash",
        ),
        reads(
            f"{_BATCH}"
            "{req_ids, num_tokens, num_computed_tokens_np, query_start_loc_np, input_ids, "
            "positions}",
            "whose rows a batch has, how many, and where each request's rows begin; tokens and "
            "positions as the target has them",
        ),
    ),
)

ADAPTIVE = PatchGroup(
    name="adaptive verification",
    feature="enable_adaptive_verification with a ViSpec head",
    remedy='leave "enable_adaptive_verification" out of the speculative config',
    runner="v2",
    is_needed=trims_drafts,
    points=(
        reads(
            f"{_BATCH}{{num_draft_tokens_per_req, query_start_loc}}",
            "draft tokens before the device cut them, and where requests begin after the cut",
        ),
    ),
)

GROUPS = (CORE, CHAINS, ADAPTIVE)
