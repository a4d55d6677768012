"""What `vllm serve HEAD` relies on in vLLM."""

from vllm_vispec.compat.patch_point import PatchGroup, wraps
from vllm_vispec.compat.patching import patch


def _apply() -> None:
    """Let ``vllm serve HEAD`` find the target that a head names."""
    from vllm.engine import arg_utils

    from vllm_vispec.heads import speculators

    # `EngineArgs` finds the function in its own module.
    patch(arg_utils, "maybe_override_with_speculators", speculators.resolve_target)


SELF_SERVING = PatchGroup(
    name="self-serving",
    feature="serving a head with the target it names",
    remedy="serve the target, with the head in --speculative-config",
    apply=_apply,
    points=(
        wraps(
            "vllm.transformers_utils.config:maybe_override_with_speculators"
            "(model, tokenizer, vllm_speculative_config, hf_token)",
            "`vllm serve HEAD`: finds the target a head names (wrapped in `vllm.engine.arg_utils`)",
        ),
    ),
)

GROUPS = (SELF_SERVING,)
