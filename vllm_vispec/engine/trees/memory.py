"""What trees take in memory: allocated when models are loaded, and said when an engine starts."""

from collections.abc import Collection
from typing import Any

from vllm_vispec.engine.trees.attention import code_rows, padding_of
from vllm_vispec.engine.trees.kept import KeptKeys
from vllm_vispec.logs import get_logger

logger = get_logger(__name__)


def keep_target_keys(vllm_config: Any, draft_layers: Collection[str]) -> KeptKeys:
    """Allocate what keeps the keys and values of the target's layers for one pass.

    Args:
        vllm_config: vLLM's, whose target and draft are loaded.
        draft_layers: Names of the draft's attention layers.
    """
    sizes, target_layers = [], []
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        padding = padding_of(layer)
        if padding is None:
            continue
        sizes.append((padding.head_size, padding.padded_size))
        # A layer that shares another's cache stores nothing.
        if name not in draft_layers and layer.kv_sharing_target_layer_name is None:
            target_layers.append(layer)
    codes = code_rows(vllm_config)
    kept = KeptKeys(codes, target_layers)
    _log(sizes, kept.num_bytes + codes.num_bytes)
    return kept


def _log(sizes: list[tuple[int, int]], num_bytes: int) -> None:
    own, padded = (sum(column) for column in zip(*sizes, strict=True))
    logger.info(
        "ViSpec trees: attention heads are padded (%s channels), which adds %.1f %% to the KV "
        "cache of %d layers; buffers for padded rows take %.1f MiB",
        ", ".join(f"{head} to {wide}" for head, wide in sorted(set(sizes))),
        100 * (padded / own - 1),
        len(sizes),
        num_bytes / 2**20,
    )
