"""CUDA graphs of the V2 runner's trees: their growth and their verification.

All are recorded and replayed by vLLM's own managers.

Shapes: R requests, S rows of logits, P nodes on the longest path with the root.
"""

from collections.abc import Callable
from copy import copy
from functools import lru_cache
from itertools import chain
from typing import Any
from weakref import ref

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorCudaGraphManager,
)

from vllm_vispec.trees.verify import NO_REQUEST, Moves, TreeBatch, TreeTable, Verification
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)
EAGERLY = "eagerly, kernel by kernel"


def chain_manager(chains: CudaGraphManager, levels: int) -> SpeculatorCudaGraphManager:
    """Return a manager like vLLM's of draft steps, for scheduled chains alone.

    vLLM records the steps of every scheduled number of draft tokens.  Numbers above ``levels`` are
    trees, whose growth has graphs of its own.

    Args:
        chains: vLLM's manager.
        levels: The longest chain that is scheduled; 0: none is.
    """
    schedule = chains.vllm_config.speculative_config.num_speculative_tokens_per_batch_size
    if schedule is not None:
        schedule = [
            (first, last, count if count <= levels else 0) for first, last, count in schedule
        ]
    mode = chains.cudagraph_mode if levels else CUDAGraphMode.NONE
    return manager_for(chains, schedule, mode, chains.decode_query_len)


def manager_for(
    like: CudaGraphManager,
    schedule: list[tuple[int, int, int]] | None,
    mode: CUDAGraphMode,
    decode_query_len: int,
) -> SpeculatorCudaGraphManager:
    """Return a manager that knows another ``num_speculative_tokens_per_batch_size``.

    The growth of trees knows no schedule: a level has as many nodes, whatever the number of draft
    tokens.  There is one graph for each padded number of requests.
    """
    config = copy(like.vllm_config)
    config.speculative_config = copy(config.speculative_config)
    config.speculative_config.num_speculative_tokens_per_batch_size = schedule
    return SpeculatorCudaGraphManager(config, like.device, mode, decode_query_len)


def why_eager(speculator: Any, width: int, cudagraph_mode: CUDAGraphMode) -> str | None:
    """Return why the levels of trees cannot run in graphs; None if they can.

    Args:
        speculator: After `set_attn`.
        width: Nodes of a level.
        cudagraph_mode: The target's, as vLLM resolved it.
    """
    if cudagraph_mode.decode_mode() != CUDAGraphMode.FULL:
        return f"cudagraph_mode={cudagraph_mode.name} has no full graphs for decoding"
    support = speculator.attn_cg_support
    if support.min_cg_support.value < AttentionCGSupport.UNIFORM_BATCH.value:
        return f"{support.min_cg_attn_backend} records no batches of several tokens a request"
    if not speculator.supports_decode_metadata_update:
        return "the draft's attention backend cannot refresh its metadata inside a graph"
    for group in chain.from_iterable(speculator.attn_groups):
        longest = group.get_metadata_builder().reorder_batch_threshold
        if longest is not None and width > longest:
            return (
                f"{group.backend.get_name()} records no requests of more than {longest} tokens, a "
                f"level of a tree has {width}; num_speculative_tokens={width - 1} is enough"
            )
    return None


@lru_cache
def log_growth(text: str, *args: Any) -> None:
    """Say how trees grow; once, though vLLM records twice: at first to measure the graphs' memory.

    Args:
        text: Behind "ViSpec trees grow", with places for ``args``.
    """
    logger.info(f"ViSpec trees grow {text}", *args)


def log_recorded_growth(manager: CudaGraphManager, width: int) -> None:
    """Say for how many requests trees grow in the graphs that were recorded."""
    recorded = max((desc.num_reqs or 0 for desc in manager.graphs), default=0)
    if recorded:
        log_growth(
            "in one CUDA graph for up to %d requests in a step; steps with more run "
            "eagerly, max_cudagraph_capture_size sets the limit",
            recorded,
        )
    else:
        log_growth(
            f"{EAGERLY}: a level has %d tokens, more than any graph; raise "
            "max_cudagraph_capture_size to at least that",
            width,
        )


class RecordedVerification:
    """Verification of a whole batch in static buffers, at addresses that recorded graphs know.

    It is recorded because it is some thirty small kernels, which take longer to launch than to run,
    and it lies between the target's pass and the draft's, where nothing else hides that time.

    Args:
        table: All trees.
        max_num_requests: Most requests of a batch.
        max_num_rows: Most rows of logits.
    """

    def __init__(self, table: TreeTable, max_num_requests: int, max_num_rows: int) -> None:
        self._table, device = table, table.depth.device

        def rows(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self._sampled, self._token = rows(max_num_rows), rows(max_num_rows)
        self._slot, self._start, self._count = (rows(max_num_requests) for _ in range(3))
        path_RP = rows(max_num_requests, table.levels + 1)
        self._found = Verification(path_RP, rows(max_num_requests), torch.zeros_like(path_RP))
        self._moves = Moves(torch.zeros_like(path_RP), torch.zeros_like(path_RP), path_RP.bool())
        self._manager: Callable[[], CudaGraphManager | None] = lambda: None

    def use_manager(self, manager: CudaGraphManager) -> None:
        """Replay what this manager records.

        vLLM drops the speculator's managers, and with them their graphs, after it has measured
        their memory: a reference of our own must not keep them alive.
        """
        self._manager = ref(manager)

    def verify(
        self, batch: TreeBatch, sampled_S: torch.Tensor, token_S: torch.Tensor
    ) -> tuple[Verification, Moves]:
        """Verify a whole batch; see `TreeBatch.verify`.  The next call overwrites the result."""
        num_requests, manager = batch.slot.shape[0], self._manager()
        if manager is None:
            return batch.verify(sampled_S, token_S)
        desc = manager.dispatch(num_requests, num_requests, 1, num_active_loras=0)
        if desc.cg_mode != CUDAGraphMode.FULL:
            return batch.verify(sampled_S, token_S)
        num_rows = sampled_S.shape[0]
        self._sampled[:num_rows], self._token[:num_rows] = sampled_S, token_S
        self._slot[:num_requests] = batch.slot
        self._start[:num_requests], self._count[:num_requests] = batch.start, batch.count
        # Requests that pad the batch have no drafts.  Their rows are read all the same: after a
        # sleep of level 2, memory that was allocated with the models holds anything.
        for rows in (self._start, self._count):
            rows[num_requests:].zero_()
        self._slot[num_requests:].fill_(NO_REQUEST)
        manager.run_fullgraph(desc)
        found = Verification(*(rows[:num_requests] for rows in self._found))
        return found, Moves(*(rows[:num_requests].flatten() for rows in self._moves))

    def record(self, manager: CudaGraphManager) -> None:
        """Record all sizes of batches that the manager lists."""
        self._slot.fill_(NO_REQUEST)
        self._count.zero_()

        def forward_of(desc: BatchExecutionDescriptor, warmup: bool) -> Callable[..., None]:
            assert desc.num_reqs is not None
            num_requests = desc.num_reqs
            return lambda mode: self.run(num_requests)

        manager.capture(forward_of, progress_bar_desc="Capturing tree verification CUDA graphs")

    def run(self, num_requests: int) -> None:
        """Verify the first requests, from buffers into buffers."""
        slot_R, start_R, count_R = (
            rows[:num_requests] for rows in (self._slot, self._start, self._count)
        )
        found, moves = self._table.verify(slot_R, start_R, count_R, self._sampled, self._token)
        for rows, new in zip((*self._found, *self._moves), (*found, *moves), strict=True):
            rows[:num_requests] = new.view(num_requests, *rows.shape[1:])
