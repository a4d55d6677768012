"""What trees cost in memory, said when an engine starts."""

from typing import Any

from vllm_vispec.engine.trees.attention import padding_of
from vllm_vispec.engine.trees.kept import KeptKeys
from vllm_vispec.logs import get_logger

logger = get_logger(__name__)


def log_memory(vllm_config: Any, kept: KeptKeys) -> None:
    """Log padded head sizes, what that adds to the KV cache, and the buffers."""
    paddings = (
        padding_of(layer)
        for layer in vllm_config.compilation_config.static_forward_context.values()
    )
    sizes = [(found.head_size, found.padded_size) for found in paddings if found is not None]
    own, padded = (sum(column) for column in zip(*sizes, strict=True))
    shown = ", ".join(f"{head} to {wide}" for head, wide in sorted(set(sizes)))
    logger.info(
        "ViSpec trees: attention heads are padded (%s channels), which adds %.1f %% to the KV "
        "cache of %d layers; buffers for accepted keys take %.1f MiB",
        shown,
        100 * (padded / own - 1),
        len(sizes),
        kept.num_bytes / 2**20,
    )
