"""What `vllm serve HEAD` touches in vLLM."""

from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint

_COMMON = (
    PatchPoint(
        "vllm.transformers_utils.config",
        "maybe_override_with_speculators",
        ("model", "tokenizer", "vllm_speculative_config", "hf_token"),
        "wraps",
        "`vllm serve HEAD`: finds the target a head names (wrapped in `vllm.engine.arg_utils`)",
    ),
)

SELF_SERVING = PatchGroup(
    name="self-serving",
    feature="serving a head with the target it names",
    remedy="serve the target, with the head in --speculative-config",
    common=_COMMON,
)
