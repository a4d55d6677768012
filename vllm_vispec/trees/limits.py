"""Refusals at start: engines in which trees could not work, said in one line with the remedy."""

from collections.abc import Mapping
from typing import Any

from vllm_vispec.trees.parts import requests_at_once
from vllm_vispec.trees.setting import tree_loads
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

_KEY = "kv_connector"
# vLLM cuts the largest size of its graphs down to a multiple of this.
_SIZE_STEP = 16
_LEAVE_OUT = 'leave "tree" out of the speculative config'
# These read the cache between steps, when accepted paths lie in consecutive slots.
_CONNECTORS = frozenset(
    {
        "DecodeBenchConnector",
        "MooncakeConnector",
        "NixlConnector",
        "NixlPullConnector",
        "NixlPushConnector",
        "OffloadingConnector",
        "SimpleCPUOffloadConnector",
    }
)


def check_target(target: Any) -> None:
    """Check a target's kind of attention.

    What single layers have, such as ALiBi, is checked when they are built.

    Args:
        target: vLLM's ``ModelConfig``.

    Raises:
        ViSpecError: Names what does not fit and the remedy.
    """
    text_config = target.hf_text_config
    found = {
        "latent attention (MLA)": target.use_mla,
        "recurrent (Mamba) layers": target.is_hybrid,
        "a sliding window": target.get_sliding_window(),
        "a soft cap on attention's logits": getattr(text_config, "attn_logit_softcapping", None),
    }
    problem = next((name for name, is_there in found.items() if is_there), None)
    if problem is not None:
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
    connector = kv_transfer.get(_KEY) if is_plain else getattr(kv_transfer, _KEY, None)
    if connector is not None and connector not in _CONNECTORS:
        raise ViSpecError(
            f"kv_connector={connector} may save keys before the accepted path is known; choose one "
            f"of {', '.join(sorted(_CONNECTORS))}, or {_LEAVE_OUT}"
        )


def check_cache_dtype(cache_dtype: str) -> None:
    """Check how keys are stored; ``auto`` may still turn out to be quantized.

    Args:
        cache_dtype: vLLM's ``kv_cache_dtype``.

    Raises:
        ViSpecError: Names the setting and the remedy.
    """
    # vLLM's own name for its modes; workers import this module before they choose a device.
    from vllm.v1.kv_cache_interface import KVQuantMode, get_kv_quant_mode

    if get_kv_quant_mode(cache_dtype) != KVQuantMode.NONE:
        raise ViSpecError(
            f"kv_cache_dtype={cache_dtype} does not work with tree, whose codes are exact in 16 "
            "bits; leave one of them out"
        )


def check_engine(vllm_config: Any, settings: TreeSettings) -> None:
    """Check what is known when the whole configuration is built.

    Raises:
        ViSpecError: Names the settings and the remedy.
    """
    # vLLM may have chosen one since the settings were checked.
    if settings.width > 1:
        check_connector(vllm_config.kv_transfer_config)
    _check_whole_batches(vllm_config)
    _check_buffers(vllm_config, settings)


def note_graphs(vllm_config: Any, settings: TreeSettings) -> None:
    """Say up to how many requests the target verifies trees in CUDA graphs, where that is not all.

    vLLM's sizes end at 512 tokens on most GPUs, which are 17 trees of 29 nodes.  The limit is
    vLLM's choice and the user's: every size more takes memory, and time at start.
    """
    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if settings.width == 1 or mode is None or not mode.has_full_cudagraphs():
        return
    size = compilation.max_cudagraph_capture_size or 0
    for requests, nodes in tree_loads(vllm_config, settings):
        recorded = size // (nodes + 1)
        most = _most_requests(vllm_config, requests, nodes + 1)
        if recorded < most:
            logger.info(
                "ViSpec trees: of steps in which the target verifies trees of %d nodes, %s in CUDA "
                "graphs; max_cudagraph_capture_size=%d would record all, up to %d requests, which "
                "takes memory and time at start",
                nodes,
                f"those with up to {recorded} requests run" if recorded else "none run",
                size_for_all_graphs(vllm_config, settings),
                most,
            )


def size_for_all_graphs(vllm_config: Any, settings: TreeSettings) -> int:
    """Return with which ``max_cudagraph_capture_size`` all passes over trees run in CUDA graphs.

    The target's have all nodes of a tree and its root for each request, the draft's a level of it.
    """
    tokens = [
        _most_requests(vllm_config, requests, rows) * rows
        for requests, nodes in tree_loads(vllm_config, settings)
        for rows in (nodes + 1, settings.width)
    ]
    budget: int = vllm_config.scheduler_config.max_num_batched_tokens
    return min(-(-max(tokens, default=0) // _SIZE_STEP) * _SIZE_STEP, budget)


def most_growing(vllm_config: Any, settings: TreeSettings) -> int:
    """Return of how many requests the draft may grow trees in one pass."""
    loads = tree_loads(vllm_config, settings)
    return max((_most_requests(vllm_config, load, settings.width) for load, _ in loads), default=0)


def _most_requests(vllm_config: Any, requests: int, rows: int) -> int:
    """Return how many requests there can be in a pass with so many rows for each."""
    return min(requests, vllm_config.scheduler_config.max_num_batched_tokens // rows)


def _check_buffers(vllm_config: Any, settings: TreeSettings) -> None:
    """A level of one tree, and a row for every other request, must fit vLLM's buffers."""
    scheduler = vllm_config.scheduler_config
    tokens, requests = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
    if requests_at_once(requests, settings.width, tokens) < 1:
        raise ViSpecError(
            f"speculative config: tree.top_k={settings.top_k} and max_num_seqs={requests} do not "
            f"fit max_num_batched_tokens={tokens}, the longest batch of a draft pass; raise it to "
            f"{requests + settings.width} or more, or lower one of the others"
        )


# Settings of vLLM's `ParallelConfig` that take a batch apart, with what they are without that.
_WHOLE_BATCHES = {
    "data_parallel_size": 1,
    "enable_batch_sharded_sampling": None,
    "enable_dbo": False,
}


def _check_whole_batches(vllm_config: Any) -> None:
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
