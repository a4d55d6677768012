"""Child-process job that looks for what a captured graph cannot do in the draft's passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.workloads import Request, drive, forget, image_text, words
from tests.support import draft_logits, engine

HOST_READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
FORBIDDEN_OPS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
NUM_REQUESTS = 4


@dataclass
class Record(TorchDispatchMode):
    """Operators with the shapes of their tensors, while :meth:`watching`."""

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
            if any(name in str(func) for name in FORBIDDEN_OPS) or _masks(func, args):
                self.violations.append(f"{self.region}: {func}")
        return result

    @contextmanager
    def watching(self, region: str) -> Iterator[None]:
        """Record the operators of ``region``; host reads in it are violations."""
        self.region, self._ops = region, []
        with self, self._no_host_reads():
            yield
        self.passes.setdefault(region, []).append(self._ops)

    @contextmanager
    def _no_host_reads(self) -> Iterator[None]:
        originals = {name: getattr(torch.Tensor, name) for name in HOST_READS}
        for name, original in originals.items():
            setattr(torch.Tensor, name, self._reporting(name, original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(torch.Tensor, name, original)

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


def _masks(func: Any, args: Any) -> bool:
    """Whether an index operator gets a Boolean mask, whose result has no fixed shape."""
    if "index" not in str(func):
        return False
    indices = [item for arg in args if isinstance(arg, list | tuple) for item in arg]
    return any(isinstance(item, torch.Tensor) and item.dtype == torch.bool for item in indices)


def _wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def instrument(proposer: Any, record: Record) -> None:
    """Record the draft model's passes, logits and our host work of ``proposer``."""
    model = proposer.model

    def watched(label: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def make(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
                with record.watching(f"{label} {tensors[0].shape[0] if tensors else ''}"):
                    return call(*args, **kwargs)

            return wrapped

        return make

    for layer in model.model.layers:
        _wrap(layer.self_attn.attn, "forward", record.pausing)
    _wrap(model.model, "forward", watched("pass"))
    _wrap(model, "compute_logits", watched("logits"))
    _wrap(proposer.draft_rows, "move", watched("move"))
    _note_inside(proposer, record)


def _note_inside(proposer: Any, record: Record) -> None:
    """Note our host work that happens inside V2's capturable functions."""
    depth = 0

    def capturable(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                return call(*args, **kwargs)
            finally:
                depth -= 1

        return wrapped

    def noted(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def make(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                record.inside += [name] if depth else []
                return call(*args, **kwargs)

            return wrapped

        return make

    for name in ("_prefill", "_multi_step_decode", "_generate_draft"):
        if hasattr(proposer, name):
            _wrap(proposer, name, capturable)
    for name in ("fill", "move"):
        _wrap(proposer.draft_rows, name, noted(name))
    _wrap(proposer.draft_rows.table, "slot_of", noted("slot_of"))


def batches(kind: str) -> dict[str, list[Request]]:
    """Return two batches of the same size: text only, and with one or two images each."""
    counts = {"text": (0, 0, 0, 0), "images": (1, 2, 1, 2)}
    return {
        name: [
            Request(
                f"{name}-{i}", f"{image_text(kind, n)} {words(i, 9)}", tuple(range(i, i + n)), 19
            )
            for i, n in enumerate(numbers)
        ]
        for name, numbers in counts.items()
    }


def inspect(kind: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Serve both batches; yield the operators of every pass by batch, and what is forbidden."""
    with engine.engine(engine.EngineOptions(**options)) as llm:
        proposer, record = draft_logits.drafter(llm), Record()
        instrument(proposer, record)
        rows = proposer.model.model.rows
        before = {name: buffer.data_ptr() for name, buffer in rows.named_buffers()}
        for name, requests in batches(kind).items():
            forget(llm)
            record.passes = {}
            drive(llm, requests)
            yield {
                "batch": name,
                "passes": {
                    key: sorted(map(list, set(map(tuple, ops))))
                    for key, ops in record.passes.items()
                },
                "violations": sorted(set(record.violations)),
                "inside": sorted(set(record.inside)),
                "moved": [n for n, b in rows.named_buffers() if b.data_ptr() != before[n]],
            }
