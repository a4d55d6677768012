"""Batches whose drafts adaptive verification has trimmed, on the V2 runner.

There the host knows how many draft tokens are verified in all and spreads them evenly; how many
each request keeps is decided on the device and never read back. Requests with drafts come first,
so everything behind them lies where the host thinks. A request with drafts is past its prompt: all
its rows have one code, and only the borders between such requests have to be moved.
"""

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch


def moved_rows(batch: InputBatch) -> torch.Tensor | None:
    """Return, for every row of the requests with drafts, a row of the same request.

    Returns:
        int64 ``[V]`` on the device: indices into the batch as the host laid it out. None if the
        host's layout is the true one.
    """
    drafts_R = batch.num_draft_tokens_per_req
    if drafts_R is None or not 0 < batch.num_draft_tokens < int(drafts_R.sum()):
        return None
    count = int(np.count_nonzero(drafts_R[: batch.num_reqs]))
    starts = batch.query_start_loc_np[: count + 1].astype(np.int64)
    ends_V = batch.query_start_loc[1 : count + 1]
    rows_V = torch.arange(int(starts[-1]), device=ends_V.device, dtype=ends_V.dtype)
    owner_V = torch.searchsorted(ends_V, rows_V, right=True)
    return async_tensor_h2d(starts[:-1], ends_V.device)[owner_V]
