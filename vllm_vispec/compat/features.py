"""What an engine's configuration asks of ViSpec, and whether the installed vLLM allows it."""

from typing import Any

from vllm.platforms import current_platform

from vllm_vispec.compat import groups
from vllm_vispec.compat.check import require
from vllm_vispec.compat.patch_point import PatchGroup, Runner
from vllm_vispec.heads.config import (
    ARCHITECTURE,
    ARCHITECTURES,
    DRAFT_VLM_ARCHITECTURE,
    EMBEDS_ARCHITECTURE,
    HeadConfig,
)
from vllm_vispec.spec_decode.options import EngineOptions
from vllm_vispec.trees.setting import has_branches, read_tree


def uses_vispec(vllm_config: Any) -> bool:
    """Whether the engine's draft is a ViSpec head."""
    return not _draft_architectures(vllm_config).isdisjoint(ARCHITECTURES)


def reads_embeddings(vllm_config: Any) -> bool:
    """Whether the draft takes the image tokens' embeddings as its input."""
    reading = {EMBEDS_ARCHITECTURE, DRAFT_VLM_ARCHITECTURE}
    return not _draft_architectures(vllm_config).isdisjoint(reading)


def reads_target_states(vllm_config: Any) -> bool:
    """Whether the draft takes the target's hidden states in; a draft VLM does not."""
    return DRAFT_VLM_ARCHITECTURE not in _draft_architectures(vllm_config)


def runner_of(vllm_config: Any) -> Runner:
    """Return the model runner that vLLM takes."""
    return "v2" if vllm_config.use_v2_model_runner else "v1"


def check_features(vllm_config: Any) -> None:
    """Check the patch points of everything that an engine with a ViSpec head uses.

    Raises:
        ViSpecError: names the first feature that cannot be used, the patch point and the remedy.
    """
    runner = runner_of(vllm_config)
    for group in needed_groups(vllm_config, runner):
        require(group, runner)


def needed_groups(vllm_config: Any, runner: Runner) -> list[PatchGroup]:
    """Return the groups of patch points without which the engine cannot run as configured."""
    speculative = vllm_config.speculative_config
    hf_config = speculative.draft_model_config.hf_config
    head = HeadConfig.from_config_json(hf_config.to_dict())
    has_tree = has_branches(vllm_config) or (runner == "v1" and read_tree(vllm_config) is not None)
    pads = has_tree or head.architecture == ARCHITECTURE
    needed = {
        groups.CORE: True,
        groups.CHAINS: True,
        groups.PADDED_HEADS: pads,
        groups.SCRATCH: pads and not current_platform.is_cpu(),
        groups.UNCOMPRESSED: head.architecture == EMBEDS_ARCHITECTURE,
        groups.GATE: head.has_compressor and head.compressor_spec.gated,
        groups.DRAFT_VLM: head.is_draft_vlm,
        groups.DRAFT_VOCAB: EngineOptions.from_hf_config(hf_config).draft_vocab_file is not None,
        groups.ADAPTIVE: trims_drafts(vllm_config),
        groups.TREES: has_tree,
    }
    return [group for group, is_needed in needed.items() if is_needed]


def trims_drafts(vllm_config: Any) -> bool:
    """Whether vLLM verifies fewer draft tokens than there are, by what it expects of them."""
    return bool(getattr(vllm_config.speculative_config, "enable_adaptive_verification", False))


def _draft_architectures(vllm_config: Any) -> set[str]:
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    return set(draft.hf_config.architectures or ()) if draft is not None else set()
