"""What trees take in memory: allocated when models are loaded, and said when an engine starts."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from vllm_vispec.trees.attention import code_rows, padding_of
from vllm_vispec.trees.target_cache import TargetCache
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class TreeMemory:
    """Memory of an engine's padded attention.

    Attributes:
        head_sizes: The models' and the padded ones, each pair once.
        num_layers: Layers of target and draft.
        kv_percent: What padding adds to the KV cache.
        num_bytes: The buffers for padded rows.
    """

    head_sizes: tuple[tuple[int, int], ...]
    num_layers: int
    kv_percent: float
    num_bytes: int


def tree_memory(vllm_config: Any) -> TreeMemory | None:
    """Measure an engine whose target and draft are loaded; None if nothing is padded.

    Args:
        vllm_config: vLLM's, as a worker has it.
    """
    shapes = [layer.impl.tree_padding.key_shape for layer in _storing_layers(vllm_config).values()]
    if not shapes:
        return None
    own = sum(num_heads * head_size for num_heads, head_size, _ in shapes)
    padded = sum(num_heads * padded_size for num_heads, _, padded_size in shapes)
    return TreeMemory(
        head_sizes=tuple(sorted({shape[1:] for shape in shapes})),
        num_layers=len(shapes),
        kv_percent=100 * (padded / own - 1),
        num_bytes=code_rows(vllm_config).num_bytes,
    )


def find_target_cache(vllm_config: Any, draft_layers: Collection[str]) -> TargetCache:
    """Return the KV cache of the target's layers, and say what trees take in memory.

    Args:
        vllm_config: vLLM's, whose target and draft are loaded.
        draft_layers: Names of the draft's attention layers.

    Raises:
        ViSpecError: Some layer's keys pass by its backend.
    """
    stores = _storing_layers(vllm_config)
    layers = [layer for name, layer in stores.items() if name not in draft_layers]
    for layer in layers:
        # vLLM 0.33 has such models.
        if getattr(layer, "kv_cache_update_bypass", False):
            raise ViSpecError(
                "speculative config: tree does not work with this model, which stores keys by an "
                'operator of its own; leave "tree" out'
            )
    _log(tree_memory(vllm_config))
    return TargetCache(layers)


def _storing_layers(vllm_config: Any) -> dict[str, Any]:
    """Return padded layers by name; not those that share another's cache."""
    layers = vllm_config.compilation_config.static_forward_context
    return {
        name: layer
        for name, layer in layers.items()
        if padding_of(layer) is not None and layer.kv_sharing_target_layer_name is None
    }


def _log(memory: TreeMemory | None) -> None:
    assert memory is not None
    logger.info(
        "ViSpec trees: attention heads are padded (%s channels), which adds %.1f %% to the KV "
        "cache of %d layers; buffers for padded rows take %.1f MiB",
        ", ".join(f"{head} to {wide}" for head, wide in memory.head_sizes),
        memory.kv_percent,
        memory.num_layers,
        memory.num_bytes / 2**20,
    )
