"""A `vllm serve` process for tests, and a folder of files served on the loopback interface."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

HOST = "127.0.0.1"
LOG_TAIL = 4000
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "NO_PROXY": HOST,
    "no_proxy": HOST,
}


class Server:
    """A running server.

    Attributes:
        url: Its address, without a path.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, log_file: Path) -> None:
        self._process, self._log_file = process, log_file
        self.url = f"http://{HOST}:{port}"

    def wait_until_ready(self, seconds: float) -> None:
        """Wait for ``/health``; fails with the end of the log."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"the server ended\n{self.log_tail()}"
            with contextlib.suppress(OSError):
                self.get("/health")
                return
            time.sleep(0.5)
        raise AssertionError(f"the server was not ready in {seconds:.0f} s\n{self.log_tail()}")

    def get(self, path: str) -> str:
        """Return the body of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return str(response.read().decode())

    def metric(self, name: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Return the samples of a counter or gauge by their labels."""
        return {
            tuple(sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.get("/metrics"))
            for sample in family.samples
            if sample.name == name
        }

    def log_tail(self) -> str:
        """Return the end of the server's log."""
        return self._log_file.read_text(errors="replace")[-LOG_TAIL:]


@contextmanager
def started_server(
    arguments: Sequence[str], log_file: Path, env: Mapping[str, str]
) -> Iterator[Server]:
    """Start ``vllm serve``; it and its children are gone after the block."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", HOST, "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(os.environ) | ENVIRONMENT | dict(env),
            start_new_session=True,
        )
    try:
        yield Server(process, port, log_file)
    finally:
        _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and its children: politely, then not."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    # The group outlives its leader when an engine process hangs.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def served_folder(folder: Path) -> Iterator[str]:
    """Serve the files of a folder on loopback; yields the address."""
    handler = functools.partial(_QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer((HOST, 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://{HOST}:{httpd.server_address[1]}"
        finally:
            httpd.shutdown()
            thread.join(10)
