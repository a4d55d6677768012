"""What the log says when an engine is configured: what is drafted, and what has no effect."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from vllm_vispec.config import ViSpecConfig, head_of, trims_drafts
from vllm_vispec.trees.limits import draft_loads, has_branches, has_paths, read_tree
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

# Below, the channels that mask images are most of the difference.
_WIDE = 1.5


def describe_drafts(vllm_config: Any) -> str:
    """Say what is drafted at which load: chains, single paths or trees, and how many tokens."""
    tree = read_tree(vllm_config)
    if ViSpecConfig.from_vllm(vllm_config).adaptive:
        most = vllm_config.speculative_config.num_speculative_tokens
        if tree is not None:
            return f"{_drafts_of(most, tree)}, or nothing where that is faster (adaptive)"
        return f"chains of up to {most} tokens, fewer or none where that is faster (adaptive)"
    if vllm_config.speculative_config.num_speculative_tokens_per_batch_size:
        parts = (
            f"{_drafts_of(count, tree)} with {first} to {last} requests"
            for first, last, count in draft_loads(vllm_config)
        )
        return ", ".join(parts)
    ((_, _, count),) = draft_loads(vllm_config)
    return _drafts_of(count, tree)


def _drafts_of(count: int, tree: TreeSettings | None) -> str:
    if count == 0:
        return "nothing"
    if tree is None or count <= tree.levels:
        # Whether paths really end early is the runner's matter, see `_path_lines`.
        ends = f" ({tree.policy}, may end early)" if tree is not None and tree.is_confident else ""
        return f"chains of {count} tokens{ends}"
    return (
        f"trees of {count} nodes on {tree.levels} levels ({tree.policy}, depth {tree.depth}, "
        f"top_k {tree.top_k})"
    )


def note_settings_without_effect(vllm_config: Any) -> None:
    """Log a line for each setting that will not do what it says.

    Args:
        vllm_config: vLLM's finished configuration, whose draft is ours.
    """
    kinds = _tree_lines, _path_lines, _schedule_lines, _image_table_lines, _page_lines
    for line in chain.from_iterable(lines(vllm_config) for lines in kinds):
        logger.warning("speculative config: %s", line)


def _tree_lines(vllm_config: Any) -> Iterator[str]:
    settings = read_tree(vllm_config)
    if settings is not None and settings.width > 1 and not has_branches(vllm_config):
        yield (
            f"tree has no branches, since no load drafts more than the {settings.levels} tokens of "
            "one path: these are drafted and verified as a chain; raise num_speculative_tokens "
            "(29 suits most heads)"
        )


def _path_lines(vllm_config: Any) -> Iterator[str]:
    if not has_paths(vllm_config):
        return
    if vllm_config.use_v2_model_runner:
        if not trims_drafts(vllm_config):
            yield (
                "single paths end early but save the target no work: the V2 model runner passes "
                "over the tokens behind their ends, too; enable_adaptive_verification=true leaves "
                "tokens out of the pass"
            )
    elif vllm_config.scheduler_config.async_scheduling:
        yield (
            "tree.threshold is ignored: single paths are drafted at full length, because with "
            "asynchronous scheduling drafts stay on the device"
        )


def _schedule_lines(vllm_config: Any) -> Iterator[str]:
    if ViSpecConfig.from_vllm(vllm_config).adaptive:
        return
    speculative = vllm_config.speculative_config
    most, requests = speculative.num_speculative_tokens, vllm_config.scheduler_config.max_num_seqs
    for first, last, count in speculative.num_speculative_tokens_per_batch_size or ():
        entry = f"[{first}, {last}, {count}] of num_speculative_tokens_per_batch_size"
        if count > most:
            yield f"{entry} drafts {most} tokens, since num_speculative_tokens={most} is the most"
        if first > requests:
            yield f"{entry} is never used, since max_num_seqs={requests}"


def _image_table_lines(vllm_config: Any) -> Iterator[str]:
    size = ViSpecConfig.from_vllm(vllm_config).image_table_size
    if size is None:
        return
    if not head_of(vllm_config).has_adaptor:
        yield f"image_table_size={size} has no effect, since this head keeps no rows of images"
    elif not vllm_config.model_config.supports_multimodal_inputs:
        yield f"image_table_size={size} has no effect, since this engine takes no images"


def _page_lines(vllm_config: Any) -> Iterator[str]:
    """vLLM gives all layers of a hybrid target pages as large as the largest, the draft's too."""
    target, parallel = vllm_config.model_config, vllm_config.parallel_config
    if not target.is_hybrid:
        return
    head = head_of(vllm_config)
    kv_heads = max(head.num_key_value_heads // parallel.tensor_parallel_size, 1)
    theirs = target.get_num_kv_heads(parallel) * target.get_head_size()
    if kv_heads * head.head_dim > _WIDE * theirs:
        yield (
            f"this head keeps {kv_heads * head.head_dim / theirs:.1f} times as much for a token as "
            "one of the target's layers of attention, and vLLM pads the target's recurrent states "
            "to pages of that size; a head with fewer num_key_value_heads leaves more room"
        )
