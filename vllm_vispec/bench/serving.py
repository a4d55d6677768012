"""The servers of one group: one per side, all up at once, one under load at a time."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol

from vllm_vispec.bench.environment import EXTENSION
from vllm_vispec.bench.machine import has_gpu
from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.schema import MemoryFacts, SpecCounters
from vllm_vispec.bench.server import ServerError, ServerSpec, option_value
from vllm_vispec.bench.sides import SIDES, Heads
from vllm_vispec.errors import ViSpecError

GPU_SHARE = 0.9
"""Of a GPU's memory, for all servers together."""
MOST_STARTS = 4
"""At once, however many cores there are: a start reads the target's weights."""
MAX_STARTS = 2
"""A server that dies under load is started once more."""


class Server(Protocol):
    """What `BenchServer` offers."""

    spec: ServerSpec
    url: str

    @property
    def alive(self) -> bool:
        """Whether the process is there."""

    def start(self) -> None:
        """Start the process."""

    def wait_until_ready(self, seconds: float) -> None:
        """Wait until it answers."""

    def forget(self) -> None:
        """Empty the caches."""

    def counters(self) -> SpecCounters | None:
        """Counters of speculation."""

    def memory(self) -> MemoryFacts:
        """What it holds."""

    def stop(self) -> None:
        """End it."""


MakeServer = Callable[[ServerSpec], Server]


def serve_arguments(
    settings: MatrixSettings, side: str, heads: Heads, num_tokens: int, servers: int
) -> tuple[str, ...]:
    """Return what follows `vllm serve` for a side, without host and port.

    Args:
        num_tokens: K.
        servers: how many share the machine.

    Raises:
        ViSpecError: the side's head cannot be used.
    """
    arguments = [settings.target, *settings.serve_args]
    if option_value(settings.serve_args, "--generation-config") is None:
        # A model's own defaults (penalties, top_k) would change what is sampled.
        arguments += ["--generation-config", "vllm"]
    share = option_value(settings.serve_args, "--gpu-memory-utilization")
    if share is None and has_gpu():
        arguments += ["--gpu-memory-utilization", f"{GPU_SHARE / servers:.3f}"]
    config = SIDES[side].speculative_config(heads, num_tokens)
    if config is not None:
        arguments += ["--speculative-config", json.dumps(config)]
        if option_value(settings.serve_args, "--worker-extension-cls") is None:
            arguments += ["--worker-extension-cls", EXTENSION]
    return tuple(arguments)


def starts_at_once() -> int:
    """Return how many servers may start together."""
    return 1 if has_gpu() else min(len(os.sched_getaffinity(0)), MOST_STARTS)


class Group:
    """Servers of some sides at one K. Use it as a context manager.

    On a GPU they are started one after the other, since vLLM looks at free memory while it starts;
    else as many at once as there are cores. One that fails does not keep the others from being
    measured.

    Args:
        ports: one for each side.
        warm_up: called with each server that has just become ready.
    """

    def __init__(
        self,
        settings: MatrixSettings,
        sides: Sequence[str],
        num_tokens: int,
        heads: Heads,
        ports: Mapping[str, int],
        logs: Path,
        make: MakeServer,
        warm_up: Callable[[Server], None],
    ) -> None:
        self._settings, self._num_tokens, self._heads = settings, num_tokens, heads
        self._ports, self._logs, self._make, self._warm_up = ports, logs, make, warm_up
        self._sides = tuple(sides)
        self._servers: dict[str, Server] = {}
        self._starts: dict[str, int] = dict.fromkeys(sides, 0)
        self._errors: dict[str, str] = {}

    def __enter__(self) -> Group:
        launched: deque[str] = deque()
        try:
            for side in self._sides:
                self._launch(side)
                launched.append(side)
                if len(launched) >= starts_at_once():
                    self._finish(launched.popleft())
            for side in launched:
                self._finish(side)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def server(self, side: str) -> Server:
        """Return a side's server; one that died is started again once.

        Raises:
            ServerError: it is not there, with the reason.
        """
        server = self._servers.get(side)
        if server is not None and server.alive:
            return server
        if self._starts[side] >= MAX_STARTS:
            raise ServerError(self._errors.get(side, f"server of {side} died {MAX_STARTS} times"))
        return self._start(side) or self.server(side)

    def first(self) -> Server | None:
        """Return a server that is up, that of "plain" if possible."""
        order = sorted(self._servers, key=lambda side: SIDES[side].draft is not None)
        return next((self._servers[side] for side in order if self._servers[side].alive), None)

    def _start(self, side: str) -> Server | None:
        self._launch(side)
        return self._finish(side)

    def _launch(self, side: str) -> None:
        """Start a process without waiting for it; a failure is kept in `_errors`."""
        self._starts[side] += 1
        old = self._servers.pop(side, None)
        if old is not None:
            old.stop()
        with self._failing(side):
            server = self._make(self._spec(side))
            self._servers[side] = server
            server.start()

    def _finish(self, side: str) -> Server | None:
        """Wait until a launched server is ready and warm it up; None if it failed."""
        with self._failing(side):
            if side in self._servers:
                self._servers[side].wait_until_ready(self._settings.ready_timeout_s)
                self._warm_up(self._servers[side])
        return self._servers.get(side)

    @contextmanager
    def _failing(self, side: str) -> Iterator[None]:
        """Note what goes wrong in the block, and end the side's server then."""
        try:
            yield
        except (ViSpecError, OSError) as error:
            self._errors[side] = str(error)
            failed = self._servers.pop(side, None)
            if failed is not None:
                failed.stop()
            # Settings do not get better: a server that never came up is not tried again.
            self._starts[side] = MAX_STARTS

    def _spec(self, side: str) -> ServerSpec:
        arguments = serve_arguments(
            self._settings, side, self._heads, self._num_tokens, len(self._sides)
        )
        log_file = self._logs / f"{side}-k{self._num_tokens}.log"
        return ServerSpec(side, arguments, self._ports[side], log_file)

    def _stop(self) -> None:
        # All are stopped, also when another signal arrives meanwhile.
        with ExitStack() as stack:
            for server in self._servers.values():
                stack.callback(server.stop)
        self._servers.clear()
