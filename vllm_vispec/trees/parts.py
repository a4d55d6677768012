"""Batches of which a draft pass takes a level of some trees only, and the others' afterwards.

A pass has room for ``max_num_batched_tokens`` rows.  Requests with drafts bring more tokens than a
level of their trees has rows, so a whole batch fits, but for batches of many short prompts.

Shapes: R requests that have no tree yet, W nodes of a level.
"""

from collections.abc import Iterator

import torch


def requests_at_once(num_requests: int, width: int, num_tokens: int) -> int:
    """Return of how many requests a draft pass takes a level; the others' rows keep their room.

    Args:
        num_requests: Of the batch.
        width: W.
        num_tokens: ``max_num_batched_tokens``.
    """
    if num_requests * width <= num_tokens:
        return num_requests
    return (num_tokens - num_requests) // width


def parts_of(num_requests: int, width: int, num_tokens: int) -> Iterator[slice]:
    """Return which requests' trees are grown together; arguments as above."""
    most = requests_at_once(num_requests, width, num_tokens)
    return (slice(start, min(start + most, num_requests)) for start in range(0, num_requests, most))


def spread_rows(rows_R: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """Repeat the first rows for every node of a level; all others follow behind them.

    Args:
        rows_R: int64 ``[R]``; where each request's row lies.
        count: Requests whose trees are grown now.
        width: W.

    Returns:
        int64 ``[count * W + R - count]``; the rows to be put in their place.
    """
    first = rows_R[:count].repeat_interleave(width)
    return first if count == len(rows_R) else torch.cat((first, rows_R[count:]))
