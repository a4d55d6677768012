"""Copies between host and device, seen on a CPU, where both are one.

Every tensor is followed by a mark: it is the host's if it was made without a device, from numpy or
on ``"cpu"`` (a string: vLLM's runners hold a ``torch.device``), or if it was computed from host
tensors alone; all others are the device's. Pinned memory is marked as well. What needs a copy on a
GPU, or makes the host wait for it, is then told by the marks: conversions, values read, indices and
operands on the host, results whose shape depends on values.

It sees what Python calls. It does not see what happens inside an operator or a kernel, and leaves
out calls by other packages, vLLM's among them: those are theirs to judge.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Tensors = list[torch.Tensor]
_HOST, _PINNED = "_watched_host", "_watched_pinned"
# Not the caller of an operator, but on the way to it.
_BETWEEN = (__file__, "/torch/", "vllm/utils/torch_utils.py")
# vLLM's code for CPUs names no device where it makes what an operator writes.
_ON_DEVICE = ("/vllm/_custom_ops.py", "/vllm/model_executor/", "/vllm/v1/attention/")

_CONVERSIONS = ("__array__", "__bool__", "__int__", "__float__", "__index__", "__contains__")
_TEXTS = ("__repr__", "__format__")
READS = {*_CONVERSIONS, *_TEXTS, "item", "tolist", "numpy", "is_nonzero", "equal", "allclose"}
SHAPED_BY_VALUES = frozenset(
    ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount")
)
SIZED = frozenset(("arange", "full", "linspace"))


def is_host(tensor: torch.Tensor) -> bool:
    """Whether a tensor is the host's."""
    return getattr(tensor, _HOST, False)


def mark_host_buffers() -> None:
    """Mark the buffers of everything alive whose names say that they are the host's.

    Buffers that a GPU reads from the host's memory count as the device's.
    """
    import gc

    for owner in gc.get_objects():
        if "Uva" in type(owner).__name__ or not hasattr(owner, "__dict__"):
            continue
        for name, value in list(vars(owner).items()) if isinstance(vars(owner), dict) else []:
            if isinstance(name, str) and "cpu" in name and isinstance(value, torch.Tensor):
                setattr(value, _HOST, True)


class CopyWatch(TorchFunctionMode):
    """Counts uploads and notes what makes the host wait, by the function that asks for it.

    Args:
        own: Calls from files whose path contains this are judged.

    Attributes:
        uploads: Copies from pinned memory that nothing waits for, by ``file:function``.
        violations: Everything else, as ``file:function: what``.
    """

    def __init__(self, own: str = "/vllm_vispec/") -> None:
        super().__init__()
        self._own = own
        self.uploads: Counter[str] = Counter()
        self.violations: Counter[str] = Counter()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch this thread; platforms without pinned memory seem to have it."""
        from vllm.utils import torch_utils

        from_numpy = torch.from_numpy

        with (
            patch.object(torch_utils, "is_pin_memory_available", lambda: True),
            patch.object(torch_utils, "PIN_MEMORY", True, create=True),
            patch.object(torch, "from_numpy", lambda array: _marked(from_numpy(array), True)),
            patch.object(torch.Tensor, "pin_memory", lambda one: _marked(one.clone(), True, True)),
            self,
        ):
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name == "is_pinned":
            return getattr(args[0], _PINNED, False)
        given = list(_tensors((args, kwargs)))
        target = _target(name, args, kwargs)
        pinned = bool(kwargs.pop("pin_memory", False))
        problem = _problem(name, args, kwargs, given, target)
        if problem == "upload":
            self._note(self.uploads, "")
        elif problem:
            self._note(self.violations, f": {problem}")
        result = func(*args, **kwargs)
        if name in ("to", "cpu") and target is not None and given and result is given[0]:
            # Elsewhere it would be a copy with a life of its own.
            result = result.clone() if is_host(given[0]) != (target == "host") else result
        if target is not None:
            host = target == "host"
        elif given:
            host = all(map(is_host, given))
        else:
            host = not any(part in _caller().co_filename for part in _ON_DEVICE)
        for tensor in _tensors((result,)):
            if not any(tensor is one for one in given):
                _marked(tensor, host, pinned)
        return result

    def _note(self, counter: Counter[str], what: str) -> None:
        code = _caller()
        if self._own in code.co_filename:
            where = code.co_filename.rpartition(self._own)[2]
            counter[f"{where}:{code.co_name}{what}"] += 1


def _caller() -> CodeType:
    """Return the code that has called an operator, helpers on the way to it left out."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and any(part in frame.f_code.co_filename for part in _BETWEEN):
        frame = frame.f_back
    assert frame is not None
    return frame.f_code


def _marked(tensor: torch.Tensor, host: bool, pinned: bool = False) -> torch.Tensor:
    setattr(tensor, _HOST, host)
    setattr(tensor, _PINNED, pinned)
    return tensor


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    yield from (one for one in tree_leaves(values) if isinstance(one, torch.Tensor))


def _target(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Where a result is wanted: ``host``, ``device``, or None where the operands are."""
    if name == "cpu":
        return "host"
    wanted = [kwargs["device"]] if kwargs.get("device") is not None else []
    if name == "to":
        wanted += [arg for arg in args[1:] if isinstance(arg, str | torch.device)]
    for device in wanted:
        return "device" if isinstance(device, torch.device) else "host"
    # Nothing to compute from and no device named: the host's.
    return None


def _problem(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], given: Tensors, target: str | None
) -> str | None:
    """What a call would cost on a GPU; ``upload`` is a copy that nothing waits for."""
    on_device = [tensor for tensor in given if not is_host(tensor)]
    if name in ("to", "cpu", "copy_"):
        return _copy_problem(name, args, kwargs, given, target)
    if name in ("tensor", "as_tensor") and not given and target == "device":
        return f"{name} makes a pageable copy"
    if not on_device:
        return None
    if name == "new_tensor" and target != "host":
        return f"{name} makes a pageable copy"
    if name in READS or (name in SIZED and target is not None):
        return f"{name} reads a value back"
    if name in SHAPED_BY_VALUES or (name == "where" and len(args) + len(kwargs) == 1):
        return f"{name} waits for the size of its result"
    if name == "repeat_interleave" and len(given) > 1 and kwargs.get("output_size") is None:
        return f"{name} waits for the size of its result"
    if name in ("__getitem__", "__setitem__"):
        return _index_problem(args)
    if any(is_host(tensor) and tensor.dim() for tensor in given):
        return f"{name} mixes host and device"
    return None


def _copy_problem(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], given: Tensors, target: str | None
) -> str | None:
    if name == "copy_":
        source, to_host = args[1], is_host(args[0])
        is_async = kwargs.get("non_blocking", len(args) > 2 and args[2])
    else:
        source, to_host = given[0], is_host(given[0]) if target is None else target == "host"
        is_async = kwargs.get("non_blocking", False)
    if is_host(source) == to_host:
        return None
    if to_host:
        return f"{name} reads back"
    if is_async and getattr(source, _PINNED, False):
        return "upload"
    return f"{name} waits for a copy" if not is_async else f"{name} copies pageable memory"


def _index_problem(args: Sequence[Any]) -> str | None:
    """An index or a new value that lies on the host, or decides on the shape."""
    if is_host(args[0]):
        return "an index of the device's reads back"
    for part in args[1] if isinstance(args[1], tuple) else (args[1],):
        if isinstance(part, torch.Tensor):
            if is_host(part):
                return "an index is copied"
            if part.dtype == torch.bool or not part.dim():
                return "an index waits for values"
        elif isinstance(part, slice):
            if any(isinstance(end, torch.Tensor) for end in (part.start, part.stop, part.step)):
                return "a slice reads a value back"
        elif not isinstance(part, int | np.integer | None | type(Ellipsis)):
            return "an index is copied"
    value = args[2] if len(args) > 2 else None
    if isinstance(value, torch.Tensor) and is_host(value) and value.dim():
        return "a value is copied"
    return None
