"""The way in: vLLM calls :func:`register` in every process it starts.

Kept trivial to import.  An exception while importing an entry point is swallowed by vLLM, and
users would then only see that ``vispec`` is no known method.
"""

from dataclasses import dataclass
from typing import Any

from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.logs import get_logger

logger = get_logger("vllm_vispec")


def register() -> None:
    """Make vLLM accept ViSpec heads.  Idempotent; changes nothing until one is used.

    Only what every engine with a head needs is checked here; what single features need is checked
    where they are used, so that one that cannot work leaves the others alone.
    """
    from vllm_vispec.compat import command_errors

    command_errors.install()
    problem = find_problem()
    if problem is not None:
        logger.error("ViSpec is disabled: %s", problem)
        _refuse(problem)
        return
    from vllm_vispec.compat.check import first_broken
    from vllm_vispec.heads.patch_points import SELF_SERVING
    from vllm_vispec.trees.patch_points import TREE_SLOTS

    _register_draft_architectures()
    _patch_configuration()
    # What cannot be patched is refused when a feature that needs it is asked for.
    for group in (SELF_SERVING, TREE_SLOTS):
        if first_broken(group.points) is None:
            group.apply()


def find_problem() -> str | None:
    """Return why ViSpec cannot work with the installed vLLM, or None."""
    from vllm_vispec.compat import check
    from vllm_vispec.spec_decode.patch_points import CORE

    return check.version_problem(check.installed_version()) or check.group_problem(CORE)


@dataclass(frozen=True)
class Refusal:
    """Stands for ``EngineArgs.create_speculative_config``.

    Attributes:
        problem: What `"method": "vispec"` fails with; everything else is vLLM's.
    """

    problem: str

    def __call__(self, original: Any, args: Any, *call_args: Any, **kwargs: Any) -> Any:
        """Refuse our method."""
        from vllm_vispec.config import METHOD, settings_of

        if settings_of(args).get("method") == METHOD:
            raise ViSpecError(self.problem)
        return original(args, *call_args, **kwargs)


def _refuse(problem: str) -> None:
    """Let ``"method": "vispec"`` fail with ``problem``, if the installed vLLM lets us."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_vispec.compat.patching import patch

    if hasattr(EngineArgs, "create_speculative_config"):
        patch(EngineArgs, "create_speculative_config", Refusal(problem))


def _patch_configuration() -> None:
    """Let vLLM's configuration accept ViSpec heads, and let workers begin with ours."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerBase

    from vllm_vispec.compat.patching import patch
    from vllm_vispec.spec_decode import config_hook, worker_hook

    patch(EngineArgs, "create_speculative_config", config_hook.create_speculative_config)
    patch(EngineArgs, "create_engine_config", config_hook.create_engine_config)
    patch(WorkerBase, "__init__", worker_hook.init_worker)


def _register_draft_architectures() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    from vllm_vispec.heads.config import (
        ARCHITECTURE,
        DRAFT_MODEL_ARCHITECTURE,
        DRAFT_VLM_ARCHITECTURE,
        EMBEDS_ARCHITECTURE,
    )

    known = ModelRegistry.get_supported_archs()
    for module, architecture in (
        ("models.vispec", ARCHITECTURE),
        ("models.uncompressed", EMBEDS_ARCHITECTURE),
        ("draft_vlm.model", DRAFT_VLM_ARCHITECTURE),
        ("draft_model.model", DRAFT_MODEL_ARCHITECTURE),
    ):
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"vllm_vispec.{module}:{architecture}")
