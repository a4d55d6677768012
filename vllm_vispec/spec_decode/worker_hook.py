"""Puts our proposers in place of vLLM's EAGLE classes, in workers that serve a ViSpec head.

vLLM's runners test the drafter's class by name, so the class is chosen in ``__new__`` rather than
by replacing the name.  Patched when a worker is built: earlier the proposers must not be imported
(they would initialise the device in a parent process), later the runner exists already.
"""

from collections.abc import Callable
from typing import Any

from vllm_vispec.compat.features import check_features, runner_of, uses_vispec
from vllm_vispec.compat.patches import (
    apply_chain_patches,
    apply_scratch_patches,
    apply_tree_patches,
)
from vllm_vispec.heads.location import head_folder
from vllm_vispec.trees.limits import note_whole_paths
from vllm_vispec.trees.setting import has_branches, has_paths, read_tree


def init_worker(
    original: Callable[..., None], worker: Any, vllm_config: Any, *args: Any, **kwargs: Any
) -> None:
    """Patch, before a worker exists, what its engine's features need; nothing without a head."""
    if uses_vispec(vllm_config):
        check_features(vllm_config)
        # A machine without the head says so before it loads the target.
        head_folder(vllm_config.speculative_config.draft_model_config)
        runner = runner_of(vllm_config)
        apply_chain_patches(runner)
        apply_scratch_patches()
        if has_branches(vllm_config):
            apply_tree_patches(runner)
    original(worker, vllm_config, *args, **kwargs)


def new_proposer(
    original: Callable[..., Any], base: type, vllm_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Make ``EagleProposer(...)`` build our proposer when the draft is a ViSpec head."""
    is_ours = base.__name__ == "EagleProposer" and uses_vispec(vllm_config)
    return original(_v1_proposer(vllm_config) if is_ours else base)


def new_speculator(
    original: Callable[..., Any], base: type, vllm_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Make ``EagleSpeculator(...)`` build our speculator when the draft is a ViSpec head."""
    is_ours = base.__name__ == "EagleSpeculator" and uses_vispec(vllm_config)
    return original(_v2_speculator(vllm_config) if is_ours else base)


def _v1_proposer(vllm_config: Any) -> type:
    if read_tree(vllm_config) is not None:
        from vllm_vispec.v1.tree_proposer import TreeProposer

        return TreeProposer
    from vllm_vispec.v1.proposer import ViSpecProposer

    return ViSpecProposer


def _v2_speculator(vllm_config: Any) -> type:
    if has_paths(vllm_config):
        note_whole_paths("the V2 model runner's drafts stay on the device")
    if has_branches(vllm_config):
        from vllm_vispec.trees.speculator import TreeSpeculator

        return TreeSpeculator
    from vllm_vispec.spec_decode.speculator import ViSpecSpeculator

    return ViSpecSpeculator
