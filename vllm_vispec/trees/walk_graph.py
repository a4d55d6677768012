"""The walk down a batch's trees in static buffers, as CUDA graphs of the V2 runner hold it.

Shapes: R requests, S rows of logits, P nodes on the longest path with the root.
"""

from collections.abc import Callable

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.dp_utils import dispatch_cg_and_sync_dp

from vllm_vispec.trees.rounds import NO_REQUEST, Moves, TreeRound, TreeTable, find_moves
from vllm_vispec.trees.walk import Walk


class StaticWalk:
    """What a walk reads and what it finds, at addresses that never change.

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
        self._found = Walk(path_RP, rows(max_num_requests), torch.zeros_like(path_RP))
        self._moves = Moves(torch.zeros_like(path_RP), torch.zeros_like(path_RP), path_RP.bool())
        # vLLM drops managers, and with them their graphs, after it has measured their memory.
        self.find_manager: Callable[[], CudaGraphManager | None] = lambda: None

    def walk(
        self, batch: TreeRound, sampled_S: torch.Tensor, token_S: torch.Tensor
    ) -> tuple[Walk, Moves]:
        """Walk down the trees of a whole batch; see `TreeRound.walk`.

        What comes out is overwritten by the next walk.
        """
        num_requests = batch.slot.shape[0]
        manager = self.find_manager()
        # Engines that are data parallel have no trees.
        desc, _ = dispatch_cg_and_sync_dp(
            manager,
            num_requests,
            num_requests,
            uniform_token_count=1,
            dp_size=1,
            dp_rank=0,
            need_eager=manager is None,
        )
        if manager is None or desc.cg_mode != CUDAGraphMode.FULL:
            found = batch.walk(sampled_S, token_S)
            return found, batch.moves(found)
        num_rows = sampled_S.shape[0]
        self._sampled[:num_rows], self._token[:num_rows] = sampled_S, token_S
        for rows, of_batch in (
            (self._slot, batch.slot),
            (self._start, batch.start),
            (self._count, batch.count),
        ):
            rows[:num_requests] = of_batch
        # Requests that pad the batch have no drafts.  Their rows are read all the same: after a
        # sleep of level 2, memory that was allocated with the models holds anything.
        for rows in (self._start, self._count):
            rows[num_requests:].zero_()
        self._slot[num_requests:].fill_(NO_REQUEST)
        manager.run_fullgraph(desc)
        found = Walk(*(rows[:num_requests] for rows in self._found))
        return found, Moves(*(rows[:num_requests].flatten() for rows in self._moves))

    def run(self, num_requests: int) -> None:
        """Walk down the trees of the first requests, from buffers into buffers."""
        slot_R, start_R, count_R = (
            rows[:num_requests] for rows in (self._slot, self._start, self._count)
        )
        found = self._table.walk(slot_R, start_R, count_R, self._sampled, self._token)
        moves = find_moves(start_R, count_R, found)
        for rows, new in zip((*self._found, *self._moves), (*found, *moves), strict=True):
            rows[:num_requests] = new.view(num_requests, *rows.shape[1:])

    def record(self, manager: CudaGraphManager) -> None:
        """Record walks of all sizes of batches that the manager lists."""
        self._slot.fill_(NO_REQUEST)
        self._count.zero_()

        def forward_of(desc: BatchExecutionDescriptor, warmup: bool) -> Callable[..., None]:
            assert desc.num_reqs is not None
            num_requests = desc.num_reqs
            return lambda mode: self.run(num_requests)

        manager.capture(forward_of, progress_bar_desc="Capturing tree walk CUDA graphs")
