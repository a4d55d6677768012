"""The setting ``tree``: resolved at configuration time, read in the workers."""

from typing import Any

from vllm_vispec.config import ViSpecConfig
from vllm_vispec.trees.codes import num_channels
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.errors import ViSpecError

_UNSUPPORTED = {
    "draft_sample_method": ("greedy", "a tree's nodes are the draft's likeliest tokens"),
    "rejection_sample_method": ("standard", "a tree is verified by the target's own samples"),
    "enable_adaptive_verification": (False, "a tree's nodes have no position of their own"),
}


def resolve_tree(tree: TreeSettings | None, settings: dict[str, Any]) -> TreeSettings | None:
    """Check the setting against the rest of the speculative config; None if it means chains.

    Raises:
        ViSpecError: Names the setting and the remedy.
    """
    if tree is None or (tree.width == 1 and not tree.is_confident):
        return None
    tree.check_nodes(settings.get("num_speculative_tokens"))
    for name, (allowed, reason) in _UNSUPPORTED.items():
        if settings.get(name, allowed) != allowed:
            raise ViSpecError(
                f"speculative config: {name}={settings[name]!r} does not work with tree "
                f"({reason}); leave one of them out"
            )
    return tree


def read_tree(vllm_config: Any) -> TreeSettings | None:
    """Return how the engine grows trees, None if it drafts chains or nothing."""
    return ViSpecConfig.from_vllm(vllm_config).tree


def has_tree(vllm_config: Any) -> bool:
    """Whether the engine grows trees, single paths that may end early among them."""
    return read_tree(vllm_config) is not None


def schedules_chains(vllm_config: Any, settings: TreeSettings) -> bool:
    """Whether the load schedule has numbers of draft tokens so small that chains are drafted."""
    return any(0 < count <= settings.levels for _, _, count in draft_loads(vllm_config))


def has_branches(vllm_config: Any) -> bool:
    """Whether there is a tree that branches, at some load; else nothing needs path codes."""
    settings = read_tree(vllm_config)
    if settings is None or settings.width == 1:
        return False
    return max(count for _, _, count in draft_loads(vllm_config)) > settings.levels


def num_code_channels(vllm_config: Any) -> int:
    """Return how many channels heads need for path codes, 0 where nothing branches."""
    settings = read_tree(vllm_config)
    if settings is None or not has_branches(vllm_config):
        return 0
    return num_channels(settings.levels, settings.top_k)


def tree_loads(vllm_config: Any, settings: TreeSettings) -> list[tuple[int, int]]:
    """Return at which loads trees with branches are drafted: most requests, and nodes."""
    most = vllm_config.scheduler_config.max_num_seqs
    loads = draft_loads(vllm_config)
    return [(min(last or most, most), n) for _, last, n in loads if n > settings.levels]


def has_paths(vllm_config: Any) -> bool:
    """Whether there are trees of a single path that may end early, at some load."""
    settings = read_tree(vllm_config)
    if settings is None or not settings.is_confident:
        return False
    return not has_branches(vllm_config) or schedules_chains(vllm_config, settings)


def draft_loads(vllm_config: Any) -> list[tuple[int, int | None, int]]:
    """Return how many draft tokens there are at which load.

    Returns:
        First and last number of requests (None: all), and the number of draft tokens.
    """
    speculative = vllm_config.speculative_config
    most, schedule = (
        speculative.num_speculative_tokens,
        speculative.num_speculative_tokens_per_batch_size,
    )
    if not schedule:
        return [(1, None, most)]
    return [(first, last, min(count, most)) for first, last, count in schedule]
