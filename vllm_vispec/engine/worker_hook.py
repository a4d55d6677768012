"""Puts our proposers in place of vLLM's EAGLE classes, in workers that serve a ViSpec head.

vLLM's runners test the drafter's class by name, so the class is chosen in ``__new__`` rather than
by replacing the name.  Installed when a worker is built: earlier the proposers must not be imported
(they would initialise the device in a parent process), later the runner exists already.
"""

from collections.abc import Callable
from typing import Any

from vllm_vispec.compat.patching import wrap_once
from vllm_vispec.engine.head_location import head_folder
from vllm_vispec.engine.trees.limits import note_whole_paths
from vllm_vispec.engine.trees.setting import has_branches, has_paths, read_tree
from vllm_vispec.head_config import (
    ARCHITECTURES,
    DRAFT_VLM_ARCHITECTURE,
    EMBEDS_ARCHITECTURE,
)


def install() -> None:
    """Wrap ``WorkerBase.__init__`` once."""
    from vllm.v1.worker.worker_base import WorkerBase

    wrap_once(WorkerBase, "__init__", _init_worker)


def _init_worker(
    original: Callable[..., None], worker: Any, vllm_config: Any, *args: Any, **kwargs: Any
) -> None:
    if uses_vispec(vllm_config):
        # A machine without the head says so before it loads the target.
        head_folder(vllm_config.speculative_config.draft_model_config)
        _install_proposers()
        _install_scratch()
    if has_branches(vllm_config):
        _install_padding()
    original(worker, vllm_config, *args, **kwargs)


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


def _draft_architectures(vllm_config: Any) -> set[str]:
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    return set(draft.hf_config.architectures or ()) if draft is not None else set()


def _install_padding() -> None:
    from vllm_vispec.engine.trees import attention, v2_state

    attention.install()
    v2_state.install()


def _install_scratch() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        from vllm_vispec.engine import attention_scratch

        attention_scratch.install()


def _install_proposers() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.spec_decode.eagle import EagleProposer
    from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator

    from vllm_vispec.engine import cpu_sampling

    if current_platform.is_cpu():
        cpu_sampling.install()
    _choose_in_new(EagleProposer, _v1_proposer)
    _choose_in_new(EagleSpeculator, _v2_speculator)


def _v1_proposer(vllm_config: Any) -> type:
    if read_tree(vllm_config) is not None:
        from vllm_vispec.engine.trees.v1 import TreeProposer

        return TreeProposer
    from vllm_vispec.engine.v1 import ViSpecProposer

    return ViSpecProposer


def _v2_speculator(vllm_config: Any) -> type:
    if has_paths(vllm_config):
        note_whole_paths("the V2 model runner's drafts stay on the device")
    if has_branches(vllm_config):
        from vllm_vispec.engine.trees.v2 import TreeSpeculator

        return TreeSpeculator
    from vllm_vispec.engine.v2 import ViSpecSpeculator

    return ViSpecSpeculator


def _choose_in_new(base: type, load_ours: Callable[[Any], type]) -> None:
    """Make ``base(vllm_config, ...)`` build our subclass when the draft is a ViSpec head."""
    if "__new__" in vars(base):
        return

    def new(cls: type, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        ours = cls is base and uses_vispec(vllm_config)
        chosen = load_ours(vllm_config) if ours else cls
        return object.__new__(chosen)

    base.__new__ = new  # type: ignore[assignment]
