"""Modes that watch torch's operators: what a CUDA graph cannot hold, a graph to replay, memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

HOST_READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
# Reads by the host, and shapes that depend on contents.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default")
# Tensors made of the host's numbers as well.
REFUSED = (*FORBIDDEN, "item", "lift_fresh", "_pin_memory")


def has_mask(func: Any, args: Any) -> bool:
    """Whether an index operator gets a Boolean mask, whose result has no fixed shape."""
    if "aten.index" not in str(func):
        return False
    indices = [item for arg in args if isinstance(arg, list | tuple) for item in arg]
    return any(isinstance(item, torch.Tensor) and item.dtype == torch.bool for item in indices)


@dataclass
class Record(TorchDispatchMode):
    """Operators with the shapes of their tensors, while :meth:`watching`.

    Attributes:
        passes: Operators of every pass over a region.
        violations: What a captured graph cannot do.
    """

    passes: dict[str, list[list[str]]] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    region: str = ""
    inside: list[str] = field(default_factory=list)
    _ops: list[str] = field(default_factory=list)
    _paused: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._paused:
            tensors = [item for item in (*args, result) if isinstance(item, torch.Tensor)]
            self._ops.append(f"{func} {[(tuple(t.shape), str(t.dtype)) for t in tensors]}")
            if any(name in str(func) for name in FORBIDDEN) or has_mask(func, args):
                self.violations.append(f"{self.region}: {func}")
        return result

    @contextmanager
    def watching(self, region: str) -> Iterator[None]:
        """Record the operators of ``region``; host reads in it are violations."""
        self.region, self._ops = region, []
        reads: dict[str, Any] = {
            name: self._reporting(name, getattr(torch.Tensor, name)) for name in HOST_READS
        }
        with self, patch.multiple(torch.Tensor, **reads):
            yield
        self.passes.setdefault(region, []).append(self._ops)

    def _reporting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._paused:
                self.violations.append(f"{self.region}: Tensor.{name}")
            return original(tensor, *args, **kwargs)

        return method

    def pausing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``call`` so that nothing in it counts: vLLM's attention backend."""

        def paused(*args: Any, **kwargs: Any) -> Any:
            before, self._paused = self._paused, True
            try:
                return call(*args, **kwargs)
            finally:
                self._paused = before

        return paused


class RecordedGraph(TorchDispatchMode):
    """A stand-in for a CUDA graph: records while it is a context, then :meth:`replay` runs it.

    What a graph cannot hold is refused while it is recorded. As in a graph, all that the host
    decided while recording is fixed, and every operator uses the memory it was recorded with.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(name in str(func) for name in REFUSED) or has_mask(func, args):
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


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make while it is active, until they are dropped.

    Tensors may have sizes alone. What an operator needs inside itself is not seen.

    Attributes:
        live: Bytes now.
        peak: Most bytes at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, torch.Tensor):
                self._known.setdefault(given.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor):
                self._count(made.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        num_bytes = storage.nbytes()
        self._known[storage] = num_bytes
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, num_bytes)

    def _drop(self, num_bytes: int) -> None:
        self.live -= num_bytes
