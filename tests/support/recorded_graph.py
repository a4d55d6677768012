"""A stand-in for a CUDA graph on CPU tensors: operators are recorded and run again.

What a graph cannot hold is refused while it is recorded.  As in a graph, all that the host decided
while recording is fixed, and every operator reads and writes the memory it was recorded with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Reads by the host, shapes that depend on contents, and tensors made of the host's numbers.
_REFUSED = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "unique",
    "equal.default",
    "lift_fresh",
    "_pin_memory",
)


class RecordedGraph(TorchDispatchMode):
    """Records while it is entered as a context; then :meth:`replay` runs all of it again."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(name in str(func) for name in _REFUSED) or _has_mask(func, args):
            raise AssertionError(f"{func} cannot be part of a CUDA graph")
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, result))
        return result

    def __len__(self) -> int:
        return len(self._calls)

    def replay(self) -> None:
        """Run the operators on the memory they were recorded with, whatever is in it now."""
        for func, args, kwargs, recorded in self._calls:
            results = tree_leaves(func(*args, **kwargs))
            for new, old in zip(results, tree_leaves(recorded), strict=True):
                # Views, and what was written in place, are there already.
                if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


def _has_mask(func: Any, args: Any) -> bool:
    """Whether an index operator gets a Boolean mask, whose result has no fixed shape."""
    if "aten.index" not in str(func):
        return False
    indices = [item for arg in args if isinstance(arg, list | tuple) for item in arg]
    return any(isinstance(item, torch.Tensor) and item.dtype == torch.bool for item in indices)
