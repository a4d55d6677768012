"""CUDA graphs of drafting on the V2 runner, all recorded and replayed by vLLM's own managers."""

from functools import lru_cache
from itertools import chain
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.cudagraph_utils import CreateForwardFn, CudaGraphManager
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorBatchDescriptor,
    SpeculatorCudaGraphManager,
)

from vllm_vispec.trees.limits import most_growing, size_for_all_graphs
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)


class TreeCudaGraphManager(SpeculatorCudaGraphManager):
    """Graphs over the growth of whole trees, one for each padded number of requests."""

    def _init_candidates(self) -> None:
        """Leave out what vLLM adds for numbers of draft tokens: a level's width never changes."""
        super()._init_candidates()
        for descs in (*self._capture_descs.values(), *self._candidates.values()):
            descs[:] = [desc for desc in descs if desc.uniform_token_count == self.decode_query_len]


class _ShortChains(CudaGraphManager):
    """Records decode graphs for chains alone, of what a load schedule may ask for."""

    max_num_speculative_tokens: int

    def capture(self, create_forward_fn: CreateForwardFn, *args: Any, **kwargs: Any) -> None:
        """Record what `SpeculatorCudaGraphManager` has listed, without what trees grow."""
        most = self.max_num_speculative_tokens
        for descs in self._capture_descs.values():
            descs[:] = [
                desc
                for desc in descs
                if not isinstance(desc, SpeculatorBatchDescriptor)
                or desc.num_speculative_tokens <= most
            ]
        super().capture(create_forward_fn, *args, **kwargs)


class ChainCudaGraphManager(SpeculatorCudaGraphManager, _ShortChains):
    """Graphs over the steps of scheduled chains; larger numbers of draft tokens are trees.

    vLLM's manager lists a graph for every number of the schedule, and hands the list to the class
    behind it in the order of bases: this is where the list is cut.
    """

    def __init__(self, *args: Any, max_num_speculative_tokens: int, **kwargs: Any) -> None:
        self.max_num_speculative_tokens = max_num_speculative_tokens
        super().__init__(*args, **kwargs)


def why_eager(speculator: Any, cudagraph_mode: CUDAGraphMode) -> str | None:
    """Return why the levels of trees cannot run in graphs; None if they can.

    Args:
        speculator: After `set_attn`.
        cudagraph_mode: The target's, as vLLM resolved it.
    """
    if cudagraph_mode.decode_mode() != CUDAGraphMode.FULL:
        return f"cudagraph_mode={cudagraph_mode.name} has no full graphs for decoding"
    support = speculator.attn_cg_support
    if support.min_cg_support.value < AttentionCGSupport.UNIFORM_BATCH.value:
        return f"{support.min_cg_attn_backend} records no batches of several tokens a request"
    if not speculator.supports_decode_metadata_update:
        return "the draft's attention backend cannot refresh its metadata inside a graph"
    width = speculator._width
    for group in chain.from_iterable(speculator.attn_groups):
        longest = group.get_metadata_builder().reorder_batch_threshold
        if longest is not None and width > longest:
            return (
                f"{group.backend.get_name()} records no requests of more than {longest} tokens, a "
                f"level of a tree has {width}; num_speculative_tokens={width - 1} is enough"
            )
    return None


def log_graphs(manager: CudaGraphManager, settings: TreeSettings, reason: str | None) -> None:
    """Say whether trees grow in graphs, and for how many requests; once, vLLM asks twice.

    Args:
        manager: Of the graphs in which trees grow.
        settings: How trees are grown.
        reason: Why they cannot grow in graphs; None if they can.
    """
    eagerly = "ViSpec trees grow eagerly, kernel by kernel: "
    if reason is not None:
        _log(eagerly + reason)
        return
    listed = (desc for descs in manager._capture_descs.values() for desc in descs)
    recorded = max((desc.num_reqs or 0 for desc in listed), default=0)
    size = manager.compilation_config.max_cudagraph_capture_size or 0
    enough = size_for_all_graphs(manager.vllm_config, settings)
    remedy = f"; max_cudagraph_capture_size={enough} would record all" if size < enough else ""
    if recorded == 0:
        _log(f"{eagerly}a level has {settings.width} tokens, graphs end at {size}{remedy}")
        return
    text = f"ViSpec trees grow in one CUDA graph for up to {recorded} requests in a step"
    if recorded < most_growing(manager.vllm_config, settings):
        text += f", and eagerly above{remedy}"
    _log(text)


@lru_cache
def _log(text: str) -> None:
    logger.info("%s", text)
