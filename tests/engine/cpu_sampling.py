"""Test-only mending of a fault of vLLM's CPU backend (0.32, V1), for temperatures above zero.

With any speculative method, its ``expand_kernel`` override writes into an int64 copy of the output
and drops it, so every temperature of the batch is uninitialised memory. GPUs run the Triton kernel.
"""

from __future__ import annotations

from typing import Any


def mend() -> None:
    """Replace ``expand_batch_to_tokens`` by a PyTorch version in this process (idempotent)."""
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def expand_batch_to_tokens(
    x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Any:
    """Repeat each request's value of ``x`` [requests] for each of its tokens; [num_tokens]."""
    import torch

    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return torch.repeat_interleave(values, counts, output_size=num_tokens)
