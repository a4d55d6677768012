"""What an engine's configuration says about trees: where they branch, what refuses them, limits."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from vllm_vispec.config import ViSpecConfig, drafts_with_published
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

# vLLM cuts the largest size of its graphs down to a multiple of this.
_SIZE_STEP = 16
_LEAVE_OUT = 'leave "tree" out of the speculative config'
# These read the cache between steps, when accepted paths lie in consecutive slots.
_CONNECTORS = (
    "DecodeBenchConnector",
    "MooncakeConnector",
    "NixlConnector",
    "NixlPullConnector",
    "NixlPushConnector",
    "OffloadingConnector",
    "SimpleCPUOffloadConnector",
)
# Single paths go with it.
_OF_BRANCHES = "enable_adaptive_verification"
_UNSUPPORTED = {
    "draft_sample_method": ("greedy", "a tree's nodes are the draft's likeliest tokens"),
    "rejection_sample_method": ("standard", "a tree is verified by the target's own samples"),
    _OF_BRANCHES: (False, "a tree's nodes have no position of their own"),
}
# Settings of vLLM's `ParallelConfig` that take a batch apart, with what they are without that.
_WHOLE_BATCHES = {
    "data_parallel_size": 1,
    "enable_batch_sharded_sampling": None,
    "enable_dbo": False,
}


def read_tree(vllm_config: Any) -> TreeSettings | None:
    """Return how the engine grows trees, None if it drafts chains or nothing."""
    return ViSpecConfig.from_vllm(vllm_config).tree


def has_tree(vllm_config: Any) -> bool:
    """Whether the engine grows trees, single paths that may end early among them."""
    return read_tree(vllm_config) is not None


def settings_of(vllm_config: Any) -> TreeSettings:
    """Return how the engine grows trees; for code that runs with trees alone."""
    settings = read_tree(vllm_config)
    assert settings is not None
    return settings


def draft_loads(vllm_config: Any) -> list[tuple[int, int | None, int]]:
    """Return how many draft tokens there are at which load.

    Returns:
        First and last number of requests (None: all), and the number of draft tokens.
    """
    speculative = vllm_config.speculative_config
    most = speculative.num_speculative_tokens
    schedule = speculative.num_speculative_tokens_per_batch_size or [(1, None, most)]
    return [(first, last, min(count, most)) for first, last, count in schedule]


def schedules_chains(vllm_config: Any, settings: TreeSettings) -> bool:
    """Whether the load schedule has numbers of draft tokens so small that chains are drafted."""
    return any(0 < count <= settings.levels for _, _, count in draft_loads(vllm_config))


def has_branches(vllm_config: Any) -> bool:
    """Whether there is a tree that branches, at some load; else no layer needs codes."""
    settings = read_tree(vllm_config)
    if settings is None or settings.width == 1:
        return False
    return any(count > settings.levels for _, _, count in draft_loads(vllm_config))


def draft_slots(vllm_config: Any, settings: TreeSettings) -> int:
    """Return how many KV slots behind a request's last token its draft passes write.

    A published model's root has one, too.
    """
    return settings.draft_slots + drafts_with_published(vllm_config)


def num_code_channels(vllm_config: Any) -> int:
    """Return how many channels heads need for codes, 0 where nothing branches."""
    return settings_of(vllm_config).num_channels if has_branches(vllm_config) else 0


def has_paths(vllm_config: Any) -> bool:
    """Whether there are trees of a single path that may end early, at some load."""
    settings = read_tree(vllm_config)
    if settings is None or not settings.is_confident:
        return False
    return not has_branches(vllm_config) or schedules_chains(vllm_config, settings)


def resolve_tree(tree: TreeSettings | None, settings: dict[str, Any]) -> TreeSettings | None:
    """Check the setting against the rest of the speculative config; None if it means chains.

    Raises:
        ViSpecError: Names the setting and the remedy.
    """
    if tree is None or (tree.width == 1 and not tree.is_confident):
        return None
    tree.check_nodes(settings.get("num_speculative_tokens"))
    for name, (allowed, reason) in _UNSUPPORTED.items():
        if name == _OF_BRANCHES and tree.width == 1:
            continue
        if settings.get(name, allowed) != allowed:
            raise ViSpecError(
                f"speculative config: {name}={settings[name]!r} does not work with tree "
                f"({reason}); leave one of them out"
            )
    return tree


def check_target(target: Any) -> None:
    """Check a target's kind of attention; what single layers have is checked when they are built.

    Args:
        target: vLLM's ``ModelConfig``.

    Raises:
        ViSpecError: Names what does not fit and the remedy.
    """
    soft_cap = getattr(target.hf_text_config, "attn_logit_softcapping", None)
    found = {
        "latent attention (MLA)": target.use_mla,
        "recurrent (Mamba) layers": target.is_hybrid,
        "a sliding window": target.get_sliding_window(),
        "attention in local chunks": getattr(target.hf_text_config, "attention_chunk_size", None),
        "a soft cap on attention's logits": soft_cap,
    }
    for problem, is_there in found.items():
        if is_there:
            raise ViSpecError(
                f"target {target.model} has {problem}, which draft trees cannot pass through; "
                f"{_LEAVE_OUT}"
            )


def check_connector(kv_transfer: Any) -> None:
    """Check who else reads the KV cache.

    Args:
        kv_transfer: vLLM's ``KVTransferConfig``, or what it is made of; None without a connector.

    Raises:
        ViSpecError: Names the setting and the remedy.
    """
    is_plain = isinstance(kv_transfer, Mapping)
    name = "kv_connector"
    connector = kv_transfer.get(name) if is_plain else getattr(kv_transfer, name, None)
    if connector is not None and connector not in _CONNECTORS:
        raise ViSpecError(
            f"kv_connector={connector} may save keys before the accepted path is known; choose one "
            f"of {', '.join(_CONNECTORS)}, or {_LEAVE_OUT}"
        )


def check_cache_dtype(cache_dtype: str, setting: str = "tree") -> None:
    """Check how keys are stored; ``auto`` may still turn out to be quantized.

    Args:
        cache_dtype: vLLM's ``kv_cache_dtype``.
        setting: What needs channels in the keys.

    Raises:
        ViSpecError: Names the setting and the remedy.
    """
    # vLLM's own name for its modes; workers import this module before they choose a device.
    from vllm.v1.kv_cache_interface import KVQuantMode, get_kv_quant_mode

    if get_kv_quant_mode(cache_dtype) != KVQuantMode.NONE:
        raise ViSpecError(
            f"kv_cache_dtype={cache_dtype} does not work with {setting}: its codes are exact in "
            "16 bits; leave one of them out"
        )


def check_engine(vllm_config: Any, settings: TreeSettings) -> None:
    """Check what is known when the whole configuration is built.

    Raises:
        ViSpecError: Names the settings and the remedy.
    """
    # vLLM may have chosen one since the settings were checked.
    if settings.width > 1:
        check_connector(vllm_config.kv_transfer_config)
    for name, plain in _WHOLE_BATCHES.items():
        value = getattr(vllm_config.parallel_config, name, plain)
        if value and value != plain:
            raise ViSpecError(
                f"{name}={value} does not work with tree, whose passes need the whole batch; "
                "leave one of them out"
            )
    if getattr(vllm_config, "watermark_config", None) is not None:
        raise ViSpecError("watermarking does not work with tree; leave one of them out")


@lru_cache
def note_requests_without_tree(width: int) -> None:
    """Say, the first time, that a step had requests for whose trees a draft pass has no room."""
    logger.info(
        "ViSpec trees: a step had more requests than a draft pass has room for, so the last ones "
        "got no tree in it; max_num_batched_tokens >= max_num_seqs * %d (nodes of a level) has "
        "room for all",
        width,
    )


def note_graphs(vllm_config: Any, settings: TreeSettings) -> None:
    """Say up to how many requests the target verifies trees in CUDA graphs, where that is not all.

    vLLM's sizes end at 512 tokens on most GPUs, which are 17 trees of 29 nodes.  The limit is
    vLLM's choice and the user's: every size more takes memory, and time at start.
    """
    compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
    mode, size = compilation.cudagraph_mode, compilation.max_cudagraph_capture_size or 0
    if settings.width == 1 or mode is None or not mode.has_full_cudagraphs():
        return
    budget = scheduler.max_num_batched_tokens
    is_adaptive = ViSpecConfig.from_vllm(vllm_config).adaptive
    for _, last, nodes in draft_loads(vllm_config):
        # Its schedule says for what graphs are recorded, and not up to where trees are drafted.
        last = None if is_adaptive else last
        most = min(last or scheduler.max_num_seqs, scheduler.max_num_seqs, budget // (nodes + 1))
        recorded = size // (nodes + 1)
        if nodes <= settings.levels or recorded >= most:
            continue
        enough = min(-(-most * (nodes + 1) // _SIZE_STEP) * _SIZE_STEP, budget)
        logger.info(
            "ViSpec trees: of steps in which the target verifies trees of %d nodes, %s in CUDA "
            "graphs; max_cudagraph_capture_size=%d would record all, up to %d requests, which "
            "takes memory and time at start",
            nodes,
            f"those with up to {recorded} requests run" if recorded else "none run",
            enough,
            most,
        )


def num_lookahead_tokens(original: Callable[[Any], int], config: Any) -> int:
    """Stands for ``VllmConfig.num_lookahead_tokens``; without trees it says what vLLM says.

    vLLM reserves as many KV slots behind a request's last token as there are draft tokens.  The
    draft passes over a tree may need more: one for every node that is expanded.
    """
    tree = read_tree(config)
    reserved = int(original(config))
    return reserved if tree is None else max(reserved, draft_slots(config, tree))


def requires_linear_draft(params: Any) -> bool:
    """Whether a request with these `SamplingParams` must get a chain instead of a tree.

    For penalties, forbidden words, least lengths, thinking budgets and grammars vLLM takes a row of
    logits to follow all rows before it.  That holds for the nodes of a chain only.
    """
    if params is None:
        return False
    return bool(
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty not in (None, 1.0)
        or params.bad_words
        or params.min_tokens
        or params.structured_outputs is not None
        or getattr(params, "thinking_token_budget", None) is not None
    )
