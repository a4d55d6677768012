"""The servers of one group: one per side, all up at once, one under load at a time."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from vllm_vispec.bench.environment import EXTENSION
from vllm_vispec.bench.machine import has_gpu
from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.server import BenchServer, ServerError, option_value
from vllm_vispec.bench.sides import SIDES, Heads
from vllm_vispec.utils.errors import ViSpecError

GPU_SHARE = 0.9
"""Of a GPU's memory, for all servers together."""
MOST_STARTS = 4
"""At once, however many cores there are: a start reads the target's weights."""
MAX_STARTS = 2
"""A server that dies under load is started once more."""


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
        make: makes a side's server.
        wait: called with each server that was started; returns when it may be measured.
    """

    def __init__(
        self,
        sides: Sequence[str],
        make: Callable[[str], BenchServer],
        wait: Callable[[BenchServer], None],
    ) -> None:
        self._make, self._wait = make, wait
        self._servers: dict[str, BenchServer] = {}
        self._starts = dict.fromkeys(sides, 0)
        self._errors: dict[str, str] = {}

    def __enter__(self) -> Group:
        launched: deque[str] = deque()
        try:
            for side in self._starts:
                self._launch(side)
                launched.append(side)
                if len(launched) >= starts_at_once():
                    self._finish(launched.popleft())
            for side in launched:
                self._finish(side)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # All are stopped, also when another signal arrives meanwhile.
        with ExitStack() as stack:
            for server in self._servers.values():
                stack.callback(server.stop)
        self._servers.clear()

    def server(self, side: str) -> BenchServer:
        """Return a side's server; one that died is started again once.

        Raises:
            ServerError: it is not there, with the reason.
        """
        if not self._is_up(side) and self._starts[side] < MAX_STARTS:
            self._launch(side)
            self._finish(side)
        if not self._is_up(side):
            raise ServerError(self._errors.get(side, f"server of {side} died {MAX_STARTS} times"))
        return self._servers[side]

    def first(self) -> BenchServer | None:
        """Return a server that is up, that of "plain" if possible."""
        order = sorted(self._servers, key=lambda side: SIDES[side].draft is not None)
        return next((self._servers[side] for side in order if self._is_up(side)), None)

    def _is_up(self, side: str) -> bool:
        return side in self._servers and self._servers[side].alive

    def _launch(self, side: str) -> None:
        """Start a process without waiting for it; a failure is kept in `_errors`."""
        self._starts[side] += 1
        if side in self._servers:
            self._servers.pop(side).stop()
        with self._failing(side):
            self._servers[side] = self._make(side)
            self._servers[side].start()

    def _finish(self, side: str) -> None:
        """Wait for a server that was launched."""
        with self._failing(side):
            if side in self._servers:
                self._wait(self._servers[side])

    @contextmanager
    def _failing(self, side: str) -> Iterator[None]:
        """Note what goes wrong in the block, and end the side's server then."""
        try:
            yield
        except (ViSpecError, OSError) as error:
            self._errors[side] = str(error)
            if side in self._servers:
                self._servers.pop(side).stop()
            # Settings do not get better: a server that never came up is not tried again.
            self._starts[side] = MAX_STARTS
