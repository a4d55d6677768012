"""The way in: vLLM calls :func:`register` in every process it starts.

Kept trivial to import.  An exception while importing an entry point is swallowed by vLLM, and
users would then only see that ``vispec`` is no known method.
"""

from vllm_vispec.utils.logs import get_logger

logger = get_logger("vllm_vispec")


def register() -> None:
    """Make vLLM accept ViSpec heads.  Idempotent; changes nothing until one is used.

    Only what every engine with a head needs is checked here; what single features need is checked
    where they are used, so that one that cannot work leaves the others alone.
    """
    from vllm_vispec.utils import command_errors

    command_errors.install()
    problem = find_problem()
    if problem is not None:
        logger.error("ViSpec is disabled: %s", problem)
        _refuse(problem)
        return
    from vllm_vispec.compat import patches
    from vllm_vispec.compat.check import first_broken
    from vllm_vispec.compat.groups import SELF_SERVING
    from vllm_vispec.trees.patch_points import SCHEDULER_POINTS

    _register_draft_architectures()
    patches.apply_core_patches()
    # What cannot be patched is refused when a feature that needs it is asked for.
    if first_broken(SELF_SERVING.points()) is None:
        patches.apply_self_serving_patches()
    if first_broken(SCHEDULER_POINTS) is None:
        patches.apply_tree_scheduler_patches()


def find_problem() -> str | None:
    """Return why ViSpec cannot work with the installed vLLM, or None."""
    from vllm_vispec.compat import versions
    from vllm_vispec.compat.check import group_problem
    from vllm_vispec.compat.groups import CORE

    return versions.version_problem(versions.installed_version()) or group_problem(CORE)


def _refuse(problem: str) -> None:
    """Let ``"method": "vispec"`` fail with ``problem``, if the installed vLLM lets us."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_vispec.compat.patching import patch
    from vllm_vispec.compat.refusal import Refusal

    if hasattr(EngineArgs, "create_speculative_config"):
        patch(EngineArgs, "create_speculative_config", Refusal(problem))


def _register_draft_architectures() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    from vllm_vispec.heads.config import (
        ARCHITECTURE,
        DRAFT_VLM_ARCHITECTURE,
        EMBEDS_ARCHITECTURE,
    )

    known = ModelRegistry.get_supported_archs()
    for module, architecture in (
        ("models.vispec", ARCHITECTURE),
        ("models.uncompressed", EMBEDS_ARCHITECTURE),
        ("draft_vlm.model", DRAFT_VLM_ARCHITECTURE),
    ):
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"vllm_vispec.{module}:{architecture}")
