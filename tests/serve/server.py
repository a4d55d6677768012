"""A `vllm serve` process for tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_vispec.bench.server import HOST, BenchServer, choose_ports

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "NO_PROXY": HOST,
    "no_proxy": HOST,
}


@contextmanager
def started_server(
    arguments: Sequence[str], log_file: Path, env: Mapping[str, str]
) -> Iterator[BenchServer]:
    """Start ``vllm serve`` as a user does; it and its children are gone after the block."""
    (port,) = choose_ports(1)
    server = BenchServer("the test", tuple(arguments), port, log_file)
    with pytest.MonkeyPatch.context() as changed:
        for name, value in {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **env}.items():
            changed.setenv(name, value)
        server.start()
    try:
        yield server
    finally:
        server.stop()
