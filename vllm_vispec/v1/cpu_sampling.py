"""Keeps sampled output right on vLLM's CPU backend (V1 runner).

In 0.32 and 0.33 the CPU override of the kernel behind ``expand_batch_to_tokens`` writes into an
int64 copy of its output and drops it, so with any speculative method and any request above
temperature zero the whole batch is sampled with uninitialised temperatures.  GPUs run the Triton
kernel and are not affected.
"""

from collections.abc import Callable
from typing import Any

import torch


def instead(original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """Stands for vLLM's ``expand_batch_to_tokens``: a PyTorch version in its place."""
    return expand_batch_to_tokens(*args, **kwargs)


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> torch.Tensor:
    """Repeat each request's value for each of its tokens.

    Args:
        x: ``[R]``, one value per request.
        cu_num_tokens: ``[R]``, tokens up to and including each request.
        num_tokens: Length of the result.
        replace_from: Value that is replaced.
        replace_to: What it is replaced by.

    Returns:
        ``[num_tokens]`` of ``x``'s dtype.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return torch.repeat_interleave(values, counts, output_size=num_tokens)
