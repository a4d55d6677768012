"""What trees take in memory: allocated when models are loaded, and said when an engine starts."""

from collections.abc import Collection
from typing import Any

from vllm.platforms import current_platform

from vllm_vispec.engine.trees.attention import padding_of
from vllm_vispec.engine.trees.kept import KeptKeys
from vllm_vispec.logs import get_logger

logger = get_logger(__name__)


def keep_target_keys(vllm_config: Any, draft_layers: Collection[str]) -> KeptKeys:
    """Allocate what keeps the keys and values of the target's layers for one pass.

    Args:
        vllm_config: vLLM's, whose target and draft are loaded.
        draft_layers: Names of the draft's attention layers.
    """
    # Recorded graphs must not depend on what is in a batch.
    kept = KeptKeys(always=not current_platform.is_cpu())
    max_num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    sizes = []
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        padding = padding_of(layer)
        if padding is None:
            continue
        sizes.append((padding.head_size, padding.padded_size))
        # A layer that shares another's cache stores nothing.
        if name not in draft_layers and layer.kv_sharing_target_layer_name is None:
            padding.kept = kept.add(layer, max_num_tokens)
    _log(sizes, kept)
    return kept


def _log(sizes: list[tuple[int, int]], kept: KeptKeys) -> None:
    own, padded = (sum(column) for column in zip(*sizes, strict=True))
    logger.info(
        "ViSpec trees: attention heads are padded (%s channels), which adds %.1f %% to the KV "
        "cache of %d layers; buffers for accepted keys take %.1f MiB",
        ", ".join(f"{head} to {wide}" for head, wide in sorted(set(sizes))),
        100 * (padded / own - 1),
        len(sizes),
        kept.num_bytes / 2**20,
    )
