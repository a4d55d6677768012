"""A `vllm serve` process: started, watched, asked for its counters, ended."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_vispec.bench.children import end_with_parent
from vllm_vispec.bench.counters import parse_counters, parse_kv_blocks
from vllm_vispec.bench.environment import EXTENSION, IMAGE_TABLE, server_environment
from vllm_vispec.bench.memory import peak_bytes
from vllm_vispec.bench.schema import MemoryFacts, SpecCounters
from vllm_vispec.engine_start import find_cause, spelled_as_option, why
from vllm_vispec.errors import ViSpecError

HOST = "127.0.0.1"
CLI = ("-m", "vllm.entrypoints.cli.main")
CACHES = ("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache")
STOP_S = 20.0


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
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> BenchServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process; it is not ready when this returns."""
        spec = self.spec
        spec.log_file.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *CLI, "serve", *spec.arguments]
        with spec.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--host", HOST, "--port", str(spec.port)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(),
                # A key press reaches only us; we end the servers in order.
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def wait_until_ready(self, seconds: float) -> None:
        """Wait for an answer of `/health`.

        Raises:
            ServerError: with the cause, as the log says it.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.alive:
                reason = why(self._log(), spelled_as_option)
                raise ServerError(
                    f"server of {self.spec.side} ended: {reason} (log: {self.spec.log_file})"
                )
            with contextlib.suppress(OSError):
                self._get("/health")
                return
            time.sleep(0.5)
        raise ServerError(
            f"server of {self.spec.side} was not ready in {seconds:.0f} s (log: "
            f"{self.spec.log_file})"
        )

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def forget(self) -> None:
        """Empty the caches of prefixes, images and vision embeddings, as after a start.

        Raises:
            ServerError: the server does not do it.
        """
        for name in CACHES:
            self._post(name)

    def counters(self) -> SpecCounters | None:
        """Return the counters of speculation since the start; None without speculation.

        Raises:
            ServerError: the server does not answer.
        """
        return parse_counters(self._metrics())

    def memory(self) -> MemoryFacts:
        """Return what the server's processes hold; image lookups are those since the start.

        Raises:
            ServerError: the server does not answer.
        """
        leader = None if self._process is None else self._process.pid
        hits, misses = self._image_lookups()
        return MemoryFacts(
            peak_bytes=None if leader is None else peak_bytes(leader),
            kv_blocks=parse_kv_blocks(self._metrics()),
            image_table_hits=hits,
            image_table_misses=misses,
        )

    def stop(self) -> None:
        """End the process and its children: politely, then not."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        # The group outlives its leader when an engine process hangs.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_S)

    def _image_lookups(self) -> tuple[int, int] | tuple[None, None]:
        """Return hits and misses of the draft's image table, Nones if it has none."""
        if option_value(self.spec.arguments, "--worker-extension-cls") != EXTENSION:
            return None, None
        answer = json.loads(self._post("collective_rpc", {"method": IMAGE_TABLE}))
        # All tensor-parallel workers look the same images up.
        found = next((one for one in answer["results"] if one), None)
        return (None, None) if found is None else (found["hits"], found["misses"])

    def _post(self, path: str, body: object = None) -> str:
        data = b"" if body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", data, kind, method="POST")
        try:
            with opener().open(request, timeout=60) as response:
                return str(response.read().decode())
        except OSError as error:
            raise ServerError(f"{self.spec.side}: POST /{path} failed ({error})") from error

    def _metrics(self) -> str:
        try:
            return self._get("/metrics")
        except OSError as error:
            raise ServerError(
                f"server of {self.spec.side} does not answer ({error}): {find_cause(self._log())} "
                f"(log: {self.spec.log_file})"
            ) from error

    def _get(self, path: str) -> str:
        with opener().open(self.url + path, timeout=30) as response:
            return str(response.read().decode())

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


def opener() -> urllib.request.OpenerDirector:
    """Loopback is never asked for through a proxy."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


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
