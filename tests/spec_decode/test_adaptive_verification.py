"""Rows of a batch whose drafts were cut on the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_vispec.spec_decode.speculator import moved_rows


def batch(drafts: list[int], kept: list[int], others: list[int]) -> Any:
    """A batch as vLLM lays it out: requests with drafts first, the host's cut an even one."""
    total = sum(kept)
    even = [total // len(kept) + (i < total % len(kept)) for i in range(len(kept))]
    host = np.cumsum([0, *(1 + n for n in even), *others], dtype=np.int32)
    device = torch.tensor([0, *(1 + n for n in kept), *others]).cumsum(0).to(torch.int32)
    given = np.array(drafts + [0] * len(others), dtype=np.int32)
    return SimpleNamespace(
        num_reqs=len(kept) + len(others),
        num_draft_tokens=total,
        num_draft_tokens_per_req=given,
        query_start_loc_np=host,
        query_start_loc=device,
    )


def test_codes_move_with_their_requests() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        kept = generator.integers(0, 4, size=5).tolist()
        one = batch([3] * 5, kept, [4, 2])
        found = moved_rows(one)
        if found is None:
            # All or nothing is verified: the host knows where everything is.
            assert sum(kept) in (0, 15)
            continue
        starts = one.query_start_loc_np
        codes = torch.repeat_interleave(
            torch.arange(7), torch.from_numpy(np.diff(starts).astype(np.int64))
        )
        codes[: len(found)] = codes[found]
        lengths = (one.query_start_loc[1:] - one.query_start_loc[:-1]).long()
        assert codes.tolist() == torch.repeat_interleave(torch.arange(7), lengths).tolist()
