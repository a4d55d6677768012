"""The setting ``tree``: resolved at configuration time, read in the workers."""

from dataclasses import replace
from typing import Any

from vllm_vispec.spec_decode.options import EngineOptions
from vllm_vispec.trees.codes import num_channels
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.errors import ViSpecError

_UNSUPPORTED = {
    "draft_sample_method": ("greedy", "a tree's nodes are the draft's likeliest tokens"),
    "rejection_sample_method": ("standard", "a tree is verified by the target's own samples"),
    "enable_adaptive_verification": (False, "a tree's nodes have no position of their own"),
}


def resolve_tree(options: EngineOptions, settings: dict[str, Any]) -> EngineOptions:
    """Check the setting and give it its defaults; a chain is no tree.

    Args:
        settings: the rest of the speculative config.

    Raises:
        ViSpecError: Names the setting and the remedy.
    """
    if options.tree is None:
        return options
    tree = TreeSettings.from_config(options.tree)
    if tree.width == 1 and not tree.is_confident:
        return replace(options, tree=None)
    tree.check_nodes(settings.get("num_speculative_tokens"))
    for name, (allowed, reason) in _UNSUPPORTED.items():
        if settings.get(name, allowed) != allowed:
            raise ViSpecError(
                f"speculative config: {name}={settings[name]!r} does not work with tree "
                f"({reason}); leave one of them out"
            )
    return replace(options, tree=tree.to_config())


def may_branch(options: EngineOptions) -> bool:
    """Whether the setting is for trees of more than one path, whatever a load schedule says."""
    return options.tree is not None and TreeSettings.from_config(options.tree).width > 1


def read_tree(vllm_config: Any) -> TreeSettings | None:
    """Return how the engine grows trees, None if it drafts chains or nothing."""
    draft = getattr(vllm_config.speculative_config, "draft_model_config", None)
    if draft is None:
        return None
    value = EngineOptions.from_hf_config(draft.hf_config).tree
    return None if value is None else TreeSettings.from_config(value)


def schedules_chains(vllm_config: Any, settings: TreeSettings) -> bool:
    """Whether the load schedule has numbers of draft tokens so small that chains are drafted."""
    return any(0 < count <= settings.levels for count in _scheduled(vllm_config))


def has_branches(vllm_config: Any) -> bool:
    """Whether there is a tree that branches, at some load; else nothing needs path codes."""
    settings = read_tree(vllm_config)
    if settings is None or settings.width == 1:
        return False
    return max(_scheduled(vllm_config)) > settings.levels


def num_code_channels(vllm_config: Any) -> int:
    """Return how many channels heads need for path codes, 0 where nothing branches."""
    settings = read_tree(vllm_config)
    if settings is None or not has_branches(vllm_config):
        return 0
    return num_channels(settings.levels, settings.top_k)


def tree_loads(vllm_config: Any, settings: TreeSettings) -> list[tuple[int, int]]:
    """Return at which loads trees with branches are drafted: most requests, and nodes."""
    speculative = vllm_config.speculative_config
    most, most_nodes = vllm_config.scheduler_config.max_num_seqs, speculative.num_speculative_tokens
    schedule = speculative.num_speculative_tokens_per_batch_size or [(1, most, most_nodes)]
    loads = ((min(last, most), min(count, most_nodes)) for _, last, count in schedule)
    return [(requests, nodes) for requests, nodes in loads if nodes > settings.levels]


def has_paths(vllm_config: Any) -> bool:
    """Whether there are trees of a single path that may end early, at some load."""
    settings = read_tree(vllm_config)
    if settings is None or not settings.is_confident:
        return False
    return not has_branches(vllm_config) or schedules_chains(vllm_config, settings)


def _scheduled(vllm_config: Any) -> list[int]:
    """Return how many draft tokens there are, at one load or another."""
    speculative = vllm_config.speculative_config
    most = speculative.num_speculative_tokens
    schedule = speculative.num_speculative_tokens_per_batch_size
    return [min(count, most) for _, _, count in schedule or ((1, 1, most),)]
