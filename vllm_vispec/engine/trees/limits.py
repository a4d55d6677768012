"""Limits of trees that depend on the whole configuration."""

from typing import Any

from vllm_vispec.errors import ViSpecError
from vllm_vispec.tree.settings import TreeSettings


def check_batch(vllm_config: Any, settings: TreeSettings) -> None:
    """Check that a draft pass over a level of every request's tree fits vLLM's buffers.

    Raises:
        ViSpecError: Names the settings and the remedy.
    """
    scheduler = vllm_config.scheduler_config
    rows = scheduler.max_num_seqs * settings.top_k
    if rows > scheduler.max_num_batched_tokens:
        raise ViSpecError(
            f"speculative config: tree.top_k={settings.top_k} times max_num_seqs="
            f"{scheduler.max_num_seqs} exceeds max_num_batched_tokens="
            f"{scheduler.max_num_batched_tokens}, the longest batch of a draft pass; raise the "
            "latter or lower one of the others"
        )


# Settings of vLLM's `ParallelConfig` that take a batch apart, with what they are without that.
_WHOLE_BATCHES = {
    "data_parallel_size": 1,
    "enable_batch_sharded_sampling": None,
    "enable_dbo": False,
}


def check_v2(vllm_config: Any) -> None:
    """Check what trees on the V2 runner cannot do.

    Raises:
        ViSpecError: Names the setting and the remedy.
    """
    parallel = vllm_config.parallel_config
    for name, plain in _WHOLE_BATCHES.items():
        value = getattr(parallel, name, plain)
        if value and value != plain:
            raise ViSpecError(
                f"{name}={value} does not work with tree, whose passes need the whole batch; "
                "leave one of them out"
            )
    if getattr(vllm_config, "watermark_config", None) is not None:
        raise ViSpecError("watermarking does not work with tree; leave one of them out")
