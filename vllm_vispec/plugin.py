"""The way in: vLLM calls :func:`register` in every process it starts.

Kept trivial to import.  An exception while importing an entry point is swallowed by vLLM, and
users would then only see that ``vispec`` is no known method.
"""

from vllm_vispec.logs import get_logger

logger = get_logger("vllm_vispec")

MIN_VERSION, MAX_VERSION = (0, 32), (0, 33)


def register() -> None:
    """Make vLLM accept ViSpec heads.  Idempotent; changes nothing until one is used."""
    from vllm_vispec.engine import command_errors, config_hook, self_serving, worker_hook
    from vllm_vispec.engine.trees import slots

    command_errors.install()
    problem = find_problem()
    if problem is not None:
        logger.error("ViSpec is disabled: %s", problem)
        config_hook.install_refusal(problem)
        return
    _register_draft_architectures()
    config_hook.install()
    self_serving.install()
    worker_hook.install()
    slots.install()


def find_problem() -> str | None:
    """Return why ViSpec cannot work with the installed vLLM, or None."""
    from vllm_vispec.compat.check import first_broken

    problem = version_problem(installed_version())
    if problem is not None:
        return problem
    broken = first_broken()
    if broken is None:
        return None
    return (
        f"patch point {broken.name} does not fit this vLLM ({broken.detail}); install vLLM "
        f"{supported_range()} or a newer vllm-vispec, and see `vispec doctor`"
    )


def installed_version() -> str:
    """Return vLLM's version, e.g. ``0.33.0``."""
    from vllm.version import __version__

    return str(__version__)


def version_problem(version: str) -> str | None:
    """Refuse a vLLM that is too old, warn about one that is too new."""
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        logger.warning(
            "ViSpec: cannot read vLLM's version %r; going by the patch points alone", version
        )
        return None
    if (major, minor) < MIN_VERSION:
        return f"vLLM {version} is too old; install vLLM {supported_range()}"
    if (major, minor) > MAX_VERSION:
        logger.warning(
            "ViSpec was tested with vLLM %s, this is %s; all patch points fit",
            supported_range(),
            version,
        )
    return None


def supported_range() -> str:
    """Return the vLLM versions this release was tested with, e.g. ``0.32 to 0.33``."""
    low, high = (".".join(map(str, version)) for version in (MIN_VERSION, MAX_VERSION))
    return f"{low} to {high}"


def _register_draft_architectures() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    from vllm_vispec.head_config import (
        ARCHITECTURE,
        DRAFT_VLM_ARCHITECTURE,
        EMBEDS_ARCHITECTURE,
    )

    known = ModelRegistry.get_supported_archs()
    for module, architecture in (
        ("model", ARCHITECTURE),
        ("embeds_model", EMBEDS_ARCHITECTURE),
        ("draft_vlm", DRAFT_VLM_ARCHITECTURE),
    ):
        if architecture not in known:
            ModelRegistry.register_model(
                architecture, f"vllm_vispec.engine.{module}:{architecture}"
            )
