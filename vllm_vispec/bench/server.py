"""`vllm serve` processes: one for each variant, all up at once, one under load at a time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_vispec.bench.machine import has_gpu, peak_bytes, server_environment
from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.schema import MemoryFacts
from vllm_vispec.bench.variants import VARIANTS, Heads
from vllm_vispec.utils.engine_start import find_cause, spelled_as_option, why
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.process import ChildProcess

HOST = "127.0.0.1"
CLI = ("-m", "vllm.entrypoints.cli.main")
CACHES = ("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache")
EXTENSION = "vllm_vispec.bench.worker_extension.BenchWorker"
IMAGE_TABLE = "vispec_image_table"
"""Class and method that a benchmark adds to workers; named, not imported: it imports vLLM."""
GPU_SHARE = 0.9
"""Of a GPU's memory, for all servers together."""
MOST_STARTS_AT_ONCE = 4
"""However many cores there are: a start reads the target's weights."""
MAX_STARTS = 2
"""A server that dies under load is started once more."""


class ServerError(ViSpecError):
    """A server that does not start, or is gone."""


@dataclass(frozen=True)
class ServerSpec:
    """What to start.

    Attributes:
        variant: its name.
        arguments: what follows `vllm serve`, without host and port.
        port: on loopback.
        log_file: gets everything the server prints.
    """

    variant: str
    arguments: tuple[str, ...]
    port: int
    log_file: Path

    @property
    def command(self) -> str:
        """What a user types to get this server."""
        return shlex.join(["vllm", "serve", *self.arguments, "--port", str(self.port)])


class BenchServer:
    """A running server. Use it as a context manager: it and its children are gone afterwards."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        self.url = f"http://{HOST}:{spec.port}"
        self._process: ChildProcess | None = None

    def __enter__(self) -> BenchServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process; it is not ready when this returns."""
        address = ["--host", HOST, "--port", str(self.spec.port)]
        command = [*CLI, "serve", *self.spec.arguments, *address]
        self._process = ChildProcess(command, server_environment(), self.spec.log_file)

    def wait_until_ready(self, seconds: float) -> None:
        """Wait for an answer of `/health`.

        Raises:
            ServerError: with the cause, as the log says it.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.alive:
                raise self._error(f"ended: {why(self._log(), spelled_as_option)}")
            with contextlib.suppress(OSError):
                call(f"{self.url}/health")
                return
            time.sleep(0.5)
        raise self._error(f"was not ready in {seconds:.0f} s")

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.alive

    def reset_caches(self) -> None:
        """Empty the caches of prefixes, images and vision embeddings, as after a start.

        Raises:
            ServerError: the server does not do it.
        """
        for name in CACHES:
            self._call(name, b"")

    def memory(self) -> MemoryFacts:
        """Return what the server's processes hold; image lookups are those since the start.

        Raises:
            ServerError: the server does not answer.
        """
        blocks = re.search(r'cache_config_info\{.*num_gpu_blocks="(\d+)"', self._call("metrics"))
        lookups = None
        if option_value(self.spec.arguments, "--worker-extension-cls") == EXTENSION:
            answer = self._call("collective_rpc", json.dumps({"method": IMAGE_TABLE}).encode())
            # All tensor-parallel workers look the same images up.
            lookups = next((one for one in json.loads(answer)["results"] if one), None)
        return MemoryFacts(
            peak_bytes=None if self._process is None else peak_bytes(self._process.pid),
            kv_blocks=None if blocks is None else int(blocks[1]),
            image_table_hits=lookups and lookups["hits"],
            image_table_misses=lookups and lookups["misses"],
        )

    def stop(self) -> None:
        """End the process and its children."""
        process, self._process = self._process, None
        if process is not None:
            process.stop()

    def _call(self, path: str, body: bytes | None = None) -> str:
        try:
            return call(f"{self.url}/{path}", body)
        except OSError as error:
            cause = find_cause(self._log())
            raise self._error(f"does not answer /{path} ({error}): {cause}") from error

    def _error(self, what: str) -> ServerError:
        return ServerError(f"server of {self.spec.variant} {what} (log: {self.spec.log_file})")

    def _log(self) -> str:
        return self.spec.log_file.read_text(errors="replace")


class ServerGroup:
    """Servers of some variants at one K. Use it as a context manager.

    On a GPU they are started one after the other, since vLLM looks at free memory while it starts;
    else as many at once as there are cores. One that fails does not keep the others from being
    measured.

    Args:
        make: makes a variant's server.
        wait: called with each server that was started; returns when it may be measured.
    """

    def __init__(
        self,
        variants: Sequence[str],
        make: Callable[[str], BenchServer],
        wait: Callable[[BenchServer], None],
    ) -> None:
        self._make, self._wait = make, wait
        self._servers: dict[str, BenchServer] = {}
        self._starts = dict.fromkeys(variants, 0)
        self._errors: dict[str, str] = {}

    def __enter__(self) -> ServerGroup:
        launched: deque[str] = deque()
        at_once = starts_at_once()
        try:
            for name in self._starts:
                self._launch(name)
                launched.append(name)
                if len(launched) >= at_once:
                    self._wait_for(launched.popleft())
            for name in launched:
                self._wait_for(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # All are stopped, also when another signal arrives meanwhile.
        with contextlib.ExitStack() as stack:
            for server in self._servers.values():
                stack.callback(server.stop)
        self._servers.clear()

    def server(self, name: str) -> BenchServer:
        """Return a variant's server; one that died is started again once.

        Raises:
            ServerError: it is not there, with the reason.
        """
        if not self._is_up(name) and self._starts[name] < MAX_STARTS:
            self._launch(name)
            self._wait_for(name)
        if not self._is_up(name):
            raise ServerError(self._errors.get(name, f"server of {name} died {MAX_STARTS} times"))
        return self._servers[name]

    def first(self) -> BenchServer | None:
        """Return a server that is up, the baseline's if possible."""
        order = sorted(self._servers, key=lambda name: VARIANTS[name].draft is not None)
        return next((self._servers[name] for name in order if self._is_up(name)), None)

    def _is_up(self, name: str) -> bool:
        return name in self._servers and self._servers[name].alive

    def _launch(self, name: str) -> None:
        """Start a process without waiting for it; a failure is kept in `_errors`."""
        self._starts[name] += 1
        if name in self._servers:
            self._servers.pop(name).stop()
        with self._noting_errors(name):
            self._servers[name] = self._make(name)
            self._servers[name].start()

    def _wait_for(self, name: str) -> None:
        with self._noting_errors(name):
            if name in self._servers:
                self._wait(self._servers[name])

    @contextlib.contextmanager
    def _noting_errors(self, name: str) -> Iterator[None]:
        """Note what goes wrong in the block, and end the variant's server then."""
        try:
            yield
        except (ViSpecError, OSError) as error:
            self._errors[name] = str(error)
            if name in self._servers:
                self._servers.pop(name).stop()
            # Settings do not get better: a server that never came up is not tried again.
            self._starts[name] = MAX_STARTS


def starts_at_once() -> int:
    """Return how many servers may start together."""
    return 1 if has_gpu() else min(len(os.sched_getaffinity(0)), MOST_STARTS_AT_ONCE)


def serve_arguments(
    settings: MatrixSettings, variant: str, heads: Heads, num_tokens: int, servers: int
) -> tuple[str, ...]:
    """Return what follows `vllm serve` for a variant, without host and port.

    Args:
        num_tokens: K.
        servers: how many share the machine.

    Raises:
        ViSpecError: the variant's head cannot be used.
    """
    arguments = [settings.target, *settings.serve_args]
    if option_value(settings.serve_args, "--generation-config") is None:
        # A model's own defaults (penalties, top_k) would change what is sampled.
        arguments += ["--generation-config", "vllm"]
    share = option_value(settings.serve_args, "--gpu-memory-utilization")
    if share is None and has_gpu():
        arguments += ["--gpu-memory-utilization", f"{GPU_SHARE / servers:.3f}"]
    config = VARIANTS[variant].speculative_config(heads, num_tokens)
    if config is not None:
        arguments += ["--speculative-config", json.dumps(config)]
        if option_value(settings.serve_args, "--worker-extension-cls") is None:
            arguments += ["--worker-extension-cls", EXTENSION]
    return tuple(arguments)


def choose_ports(count: int, first: int = 0) -> tuple[int, ...]:
    """Return free ports: from ``first`` on, or any if it is 0.

    Raises:
        ViSpecError: one of them is in use.
    """
    with contextlib.ExitStack() as stack:
        found = []
        for port in range(first, first + count) if first else [0] * count:
            probe = stack.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except (OSError, OverflowError) as error:
                raise ViSpecError(
                    f"--port {first}: port {port} is in use or not allowed; choose another, or 0 "
                    "for any that is free"
                ) from error
            found.append(int(probe.getsockname()[1]))
    return tuple(found)


def call(url: str, body: bytes | None = None, seconds: float = 60) -> str:
    """Return the answer to a GET, or to a POST of JSON; loopback is not asked through a proxy.

    Raises:
        OSError: there is none, or it is an error.
    """
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=seconds) as response:
        return str(response.read().decode())


def option_value(arguments: Sequence[str], name: str) -> str | None:
    """Return the value of an option, given as two arguments or as ``--name=value``.

    Underscores count as dashes, as in vLLM. None if the option is not there.
    """
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag.replace("_", "-") != name:
            continue
        if equals:
            return value
        return arguments[place + 1] if place + 1 < len(arguments) else ""
    return None
