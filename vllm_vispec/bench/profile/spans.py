"""What ran when inside an engine: spans within spans, read off one clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vllm_vispec.utils.errors import ViSpecError

if TYPE_CHECKING:
    from torch.nn import Module

Clock = Callable[[], float]


@dataclass(frozen=True)
class Prompt:
    """A request that enters the batch.

    Attributes:
        tokens: of its prompt, image tokens included.
        computed: of these, how many the engine had already.
        image_tokens: of these, how many stand for images.
    """

    tokens: int
    computed: int = 0
    image_tokens: int = 0


@dataclass(frozen=True)
class Batch:
    """What one target pass is over.

    Attributes:
        scheduled: tokens of every request.
        drafted: draft tokens among them, request by request.
        prompts: the requests that enter with this batch.
    """

    scheduled: tuple[int, ...]
    drafted: tuple[int, ...]
    prompts: tuple[Prompt, ...] = ()


@dataclass
class Span:
    """Something that ran from ``begin`` to ``end``, in seconds.

    Attributes:
        inner: seconds of the spans directly inside.
        batch: for a target pass's step, what it is over.
    """

    name: str
    begin: float
    end: float = 0.0
    inner: float = 0.0
    batch: Batch | None = None

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin

    @property
    def own(self) -> float:
        """How long it took without the spans inside."""
        return self.seconds - self.inner


@dataclass
class Recorder:
    """Collects spans of one thread in the order in which they begin.

    Attributes:
        now: the clock.
    """

    now: Clock
    _spans: list[Span] = field(default_factory=list)
    _open: list[Span] = field(default_factory=list)

    def take(self) -> list[Span]:
        """Return the spans since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def begin(self, name: str, batch: Batch | None = None) -> Span:
        """Open a span inside of those that are open."""
        span = Span(name, self.now(), batch=batch)
        self._spans.append(span)
        self._open.append(span)
        return span

    def end(self, span: Span) -> None:
        """Close a span, and those that an error left open inside."""
        span.end = self.now()
        while self._open and self._open.pop() is not span:
            pass
        if self._open:
            self._open[-1].inner += span.seconds

    @contextmanager
    def span(self, name: str, batch: Batch | None = None) -> Iterator[None]:
        """Record what runs inside of the block."""
        span = self.begin(name, batch)
        try:
            yield
        finally:
            self.end(span)

    def wrap(
        self,
        owner: object,
        method: str,
        name: str,
        batch_of: Callable[..., Batch] | None = None,
    ) -> None:
        """Record every call of one object's method; its class stays as it is.

        A call inside of a span with the same name belongs to that span.

        Args:
            name: of the spans.
            batch_of: makes the span's batch from the call's arguments.

        Raises:
            ViSpecError: there is no such method.
        """
        original = getattr(owner, method, None)
        if original is None:
            raise ViSpecError(
                f"{type(owner).__name__} has no {method}: this vLLM's rounds cannot be split; "
                "profile with vLLM 0.32 or 0.33"
            )

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._open and self._open[-1].name == name:
                return original(*args, **kwargs)
            with self.span(name, batch_of(*args, **kwargs) if batch_of else None):
                return original(*args, **kwargs)

        setattr(owner, method, timed)

    def hook(self, module: Module, name: str) -> None:
        """Record every forward pass of a module."""
        opened: list[Span] = []
        module.register_forward_pre_hook(lambda *_: opened.append(self.begin(name)))
        module.register_forward_hook(lambda *_: self.end(opened.pop()))


def wall_time() -> float:
    """Return the time once the device is idle.

    Waiting for the device takes away that host and device work at the same time; without it, work
    would be counted where the host waits for it, not where it is asked for.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ``cpu`` counts what this thread used, which other programs on a busy machine hardly change.
CLOCKS: Mapping[str, Clock] = MappingProxyType({"wall": wall_time, "cpu": time.thread_time})
