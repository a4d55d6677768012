"""A `vllm serve` process: started, watched, asked for its counters, ended."""

from __future__ import annotations

import contextlib
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

from vllm_vispec.bench.memory import peak_bytes
from vllm_vispec.bench.schema import MemoryFacts, SpecCounters
from vllm_vispec.errors import ViSpecError

HOST = "127.0.0.1"
CLI = ("-m", "vllm.entrypoints.cli.main")
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    # Opens the addresses that empty the caches; the server listens on loopback only.
    "VLLM_SERVER_DEV_MODE": "1",
    # Read by vLLM's CPU backend only: cache in GiB, and no claim on all cores.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
CACHES = ("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache")
PREFIX = "vllm:spec_decode_num_"
LOG_TAIL = 1500
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
            )

    def wait_until_ready(self, seconds: float) -> None:
        """Wait for an answer of `/health`.

        Raises:
            ServerError: with the end of the log.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.alive:
                raise ServerError(f"server of {self.spec.side} ended: {self._log_tail()}")
            with contextlib.suppress(OSError):
                self._get("/health")
                return
            time.sleep(0.5)
        raise ServerError(
            f"server of {self.spec.side} was not ready in {seconds:.0f} s: {self._log_tail()}"
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
            request = urllib.request.Request(f"{self.url}/{name}", data=b"", method="POST")
            try:
                with opener().open(request, timeout=60):
                    pass
            except OSError as error:
                raise ServerError(f"{self.spec.side}: POST /{name} failed ({error})") from error

    def counters(self) -> SpecCounters | None:
        """Return the counters of speculation since the start; None without speculation.

        Raises:
            ServerError: the server does not answer.
        """
        return parse_counters(self._metrics())

    def memory(self) -> MemoryFacts:
        """Return what the server's processes hold.

        Raises:
            ServerError: the server does not answer.
        """
        leader = None if self._process is None else self._process.pid
        return MemoryFacts(
            peak_bytes=None if leader is None else peak_bytes(leader),
            kv_blocks=parse_kv_blocks(self._metrics()),
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

    def _metrics(self) -> str:
        try:
            return self._get("/metrics")
        except OSError as error:
            raise ServerError(
                f"server of {self.spec.side} does not answer ({error}): {self._log_tail()}"
            ) from error

    def _get(self, path: str) -> str:
        with opener().open(self.url + path, timeout=30) as response:
            return str(response.read().decode())

    def _log_tail(self) -> str:
        text = self.spec.log_file.read_text(errors="replace")
        return f"{text[-LOG_TAIL:].strip()}\n(all of it in {self.spec.log_file})"


def parse_counters(metrics: str) -> SpecCounters | None:
    """Read vLLM's Prometheus text; all engines of the server are added up."""
    from prometheus_client.parser import text_string_to_metric_families

    totals: dict[str, float] = {}
    positions: dict[int, float] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if not sample.name.startswith(PREFIX) or not sample.name.endswith("_total"):
                continue
            name = sample.name.removeprefix(PREFIX).removesuffix("_total")
            totals[name] = totals.get(name, 0) + sample.value
            if "position" in sample.labels:
                position = int(sample.labels["position"])
                positions[position] = positions.get(position, 0) + sample.value
    if "drafts" not in totals:
        return None
    return SpecCounters(
        rounds=int(totals["drafts"]),
        draft_tokens=int(totals["draft_tokens"]),
        accepted_tokens=int(totals["accepted_tokens"]),
        accepted_by_position=tuple(int(positions[index]) for index in sorted(positions)),
    )


def parse_kv_blocks(metrics: str) -> int | None:
    """Read the number of KV-cache blocks from vLLM's Prometheus text, if it is there."""
    from prometheus_client.parser import text_string_to_metric_families

    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            blocks = sample.labels.get("num_gpu_blocks", "")
            if sample.name == "vllm:cache_config_info" and blocks.isdigit():
                return int(blocks)
    return None


def difference(after: SpecCounters | None, before: SpecCounters | None) -> SpecCounters | None:
    """Return what was counted between two readings; None without speculation."""
    if after is None or before is None:
        return after
    return SpecCounters(
        rounds=after.rounds - before.rounds,
        draft_tokens=after.draft_tokens - before.draft_tokens,
        accepted_tokens=after.accepted_tokens - before.accepted_tokens,
        accepted_by_position=tuple(
            a - b
            for a, b in zip(after.accepted_by_position, before.accepted_by_position, strict=True)
        ),
    )


def server_environment() -> dict[str, str]:
    """Return the environment of a server or a load generator; what the user set stays."""
    return ENVIRONMENT | dict(os.environ) | {"VLLM_SERVER_DEV_MODE": "1"}


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
