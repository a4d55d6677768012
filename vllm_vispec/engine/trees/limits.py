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
