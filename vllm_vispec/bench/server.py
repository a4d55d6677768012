"""A `vllm serve` process: started, watched, asked what it holds, ended."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import socket
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_vispec.bench.children import ChildProcess
from vllm_vispec.bench.environment import EXTENSION, IMAGE_TABLE, server_environment
from vllm_vispec.bench.memory import peak_bytes
from vllm_vispec.bench.schema import MemoryFacts
from vllm_vispec.utils.engine_start import find_cause, spelled_as_option, why
from vllm_vispec.utils.errors import ViSpecError

HOST = "127.0.0.1"
CLI = ("-m", "vllm.entrypoints.cli.main")
CACHES = ("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache")


class ServerError(ViSpecError):
    """A server that does not start, or is gone."""


@dataclass(frozen=True)
class ServerSpec:
    """What to start.

    Attributes:
        side: its name.
        arguments: what follows `vllm serve`, without host and port.
        port: on loopback.
        log_file: gets everything the server says.
    """

    side: str
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

    def forget(self) -> None:
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
        hits, misses = self._image_lookups()
        return MemoryFacts(
            peak_bytes=None if self._process is None else peak_bytes(self._process.pid),
            kv_blocks=None if blocks is None else int(blocks[1]),
            image_table_hits=hits,
            image_table_misses=misses,
        )

    def stop(self) -> None:
        """End the process and its children: politely, then not."""
        process, self._process = self._process, None
        if process is not None:
            process.stop()

    def _image_lookups(self) -> tuple[int, int] | tuple[None, None]:
        """Return hits and misses of the draft's image table, Nones if it has none."""
        if option_value(self.spec.arguments, "--worker-extension-cls") != EXTENSION:
            return None, None
        answer = self._call("collective_rpc", json.dumps({"method": IMAGE_TABLE}).encode())
        # All tensor-parallel workers look the same images up.
        found = next((one for one in json.loads(answer)["results"] if one), None)
        return (None, None) if found is None else (found["hits"], found["misses"])

    def _call(self, path: str, body: bytes | None = None) -> str:
        try:
            return call(f"{self.url}/{path}", body)
        except OSError as error:
            cause = find_cause(self._log())
            raise self._error(f"does not answer /{path} ({error}): {cause}") from error

    def _error(self, what: str) -> ServerError:
        return ServerError(f"server of {self.spec.side} {what} (log: {self.spec.log_file})")

    def _log(self) -> str:
        return self.spec.log_file.read_text(errors="replace")


def choose_ports(count: int, first: int = 0) -> tuple[int, ...]:
    """Return free ports: from ``first`` on, or any if it is 0.

    Raises:
        ViSpecError: one of them is in use.
    """
    wanted = range(first, first + count) if first else [0] * count
    with contextlib.ExitStack() as stack:
        found = []
        for port in wanted:
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
