"""`vllm serve` processes: one for each variant, all up at once, one under load at a time."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import socket
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_vispec.bench.machine import has_gpu, peak_bytes, server_environment
from vllm_vispec.bench.matrix import MatrixSettings, find_variant
from vllm_vispec.bench.schema import MemoryFacts
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
READY_S = 1800.0
"""Longest start of a server."""


@dataclass
class BenchServer:
    """A server on loopback.

    Attributes:
        variant: its name.
        arguments: what follows `vllm serve`, without host and port.
        log_file: gets everything the server prints.
    """

    variant: str
    arguments: tuple[str, ...]
    port: int
    log_file: Path
    _process: ChildProcess | None = field(default=None, init=False)

    @property
    def command(self) -> str:
        """What a user types to get this server."""
        return shlex.join(["vllm", "serve", *self.arguments, "--port", str(self.port)])

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process; it is not ready when this returns."""
        command = [*CLI, "serve", *self.arguments, "--host", HOST, "--port", str(self.port)]
        self._process = ChildProcess(command, server_environment(), self.log_file)

    def stop(self) -> None:
        """End the process and its children."""
        process, self._process = self._process, None
        if process is not None:
            process.stop()

    def wait_until_ready(self, seconds: float = READY_S) -> None:
        """Wait for an answer of `/health`.

        Raises:
            ViSpecError: with the cause, as the log says it.
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

    def reset_caches(self) -> None:
        """Empty the caches of prefixes, images and vision embeddings, as after a start.

        Raises:
            ViSpecError: the server does not do it.
        """
        for name in CACHES:
            self._call(name, b"")

    def memory(self) -> MemoryFacts:
        """Return what the server's processes hold; image lookups are those since the start.

        Raises:
            ViSpecError: the server does not answer.
        """
        blocks = re.search(r'cache_config_info\{.*num_gpu_blocks="(\d+)"', self._call("metrics"))
        lookups = None
        if option_value(self.arguments, "--worker-extension-cls") == EXTENSION:
            answer = self._call("collective_rpc", json.dumps({"method": IMAGE_TABLE}).encode())
            # All tensor-parallel workers look the same images up.
            lookups = next((one for one in json.loads(answer)["results"] if one), None)
        return MemoryFacts(
            peak_bytes=None if self._process is None else peak_bytes(self._process.pid),
            kv_blocks=None if blocks is None else int(blocks[1]),
            image_table_hits=lookups and lookups["hits"],
            image_table_misses=lookups and lookups["misses"],
        )

    def _call(self, path: str, body: bytes | None = None) -> str:
        try:
            return call(f"{self.url}/{path}", body)
        except OSError as error:
            cause = find_cause(self._log())
            raise self._error(f"does not answer /{path} ({error}): {cause}") from error

    def _error(self, what: str) -> ViSpecError:
        return ViSpecError(f"server of {self.variant} {what} (log: {self.log_file})")

    def _log(self) -> str:
        return self.log_file.read_text(errors="replace")


class ServerGroup:
    """Servers at one K. Use it as a context manager: all are gone afterwards.

    On a GPU they are started one after the other, since vLLM looks at free memory while it starts;
    else as many at once as there are cores. One that fails does not keep the others from being
    measured.

    Args:
        servers: by variant.
        wait: called with each server that was started; returns when it may be measured.
    """

    def __init__(
        self, servers: Mapping[str, BenchServer], wait: Callable[[BenchServer], None]
    ) -> None:
        self._servers, self._wait = servers, wait
        self._restarted: set[str] = set()
        self._errors: dict[str, str] = {}

    def __enter__(self) -> ServerGroup:
        at_once, servers = starts_at_once(), list(self._servers.values())
        try:
            for first in range(0, len(servers), at_once):
                batch = servers[first : first + at_once]
                for server in batch:
                    server.start()
                for server in batch:
                    self._wait_for(server)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # All are stopped, also when another signal arrives meanwhile.
        with contextlib.ExitStack() as stack:
            for server in self._servers.values():
                stack.callback(server.stop)

    def server(self, name: str) -> BenchServer:
        """Return a variant's server; one that died under load is started again once.

        Raises:
            ViSpecError: it is not there, with the reason.
        """
        server = self._servers[name]
        # Settings do not get better: a server that never came up is not tried again.
        if not server.alive and name not in self._errors and name not in self._restarted:
            self._restarted.add(name)
            server.stop()
            server.start()
            self._wait_for(server)
        if not server.alive:
            raise ViSpecError(self._errors.get(name, f"server of {name} died twice"))
        return server

    def _wait_for(self, server: BenchServer) -> None:
        """Wait; a server that does not come up is ended, and why is kept in `_errors`."""
        try:
            self._wait(server)
        except (ViSpecError, OSError) as error:
            self._errors[server.variant] = str(error)
            server.stop()


def starts_at_once() -> int:
    """Return how many servers may start together."""
    return 1 if has_gpu() else min(len(os.sched_getaffinity(0)), MOST_STARTS_AT_ONCE)


def serve_arguments(
    settings: MatrixSettings, variant: str, heads: Path, num_tokens: int, servers: int
) -> tuple[str, ...]:
    """Return what follows `vllm serve` for a variant, without host and port.

    Args:
        heads: folder of heads that are made for the run.
        num_tokens: K.
        servers: how many share the machine.

    Raises:
        ViSpecError: the variant's head cannot be used.
    """
    # A model's own defaults (penalties, top_k) would change what is sampled.
    options = {"--generation-config": "vllm"}
    if has_gpu():
        options["--gpu-memory-utilization"] = f"{GPU_SHARE / servers:.3f}"
    known = find_variant(variant)
    assert known is not None  # as the settings checked
    config = known.speculative_config(settings, heads, num_tokens)
    if config is not None:
        options["--worker-extension-cls"] = EXTENSION
    given = settings.serve_args
    added = [pair for pair in options.items() if option_value(given, pair[0]) is None]
    if config is not None:
        added.append(("--speculative-config", json.dumps(config)))
    return (settings.target, *given, *(word for pair in added for word in pair))


def choose_ports(count: int, first: int = 0) -> tuple[int, ...]:
    """Return free ports: from ``first`` on, or any if it is 0.

    Raises:
        ViSpecError: one of them is in use.
    """
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for number, probe in enumerate(probes):
            port = first and first + number
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except (OSError, OverflowError) as error:
                raise ViSpecError(
                    f"--port {first}: port {port} is in use or not allowed; choose another, or 0 "
                    "for any that is free"
                ) from error
        return tuple(int(probe.getsockname()[1]) for probe in probes)


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
    """Return the value of an option of vLLM, None if it is not there.

    Underscores count as dashes, and ``--name=value`` as two arguments, as in vLLM.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names = {name, "--" + name.removeprefix("--").replace("-", "_")}
    parser.add_argument(*names, dest="value", nargs="?", const="")
    value: str | None = parser.parse_known_args(list(arguments))[0].value
    return value
