"""What the servers and the load generator get from us beside their arguments."""

from __future__ import annotations

import os
from typing import Any

from vllm_vispec.bench.machine import describe_machine, has_gpu

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    # Opens the addresses that empty the caches; the server listens on loopback only.
    "VLLM_SERVER_DEV_MODE": "1",
    # Read by vLLM's CPU backend only: cache in GiB, and no claim on all cores.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
CPU_ENVIRONMENT = {
    # The worker lives in the engine's process, as it does on one GPU.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
EXTENSION = "vllm_vispec.bench.worker_extension.BenchWorker"
IMAGE_TABLE = "vispec_image_table"
"""Class and method that a benchmark adds to workers; named, not imported: it imports vLLM."""
RECORDED = (*ENVIRONMENT, *CPU_ENVIRONMENT, "OMP_NUM_THREADS", "VLLM_USE_V2_MODEL_RUNNER")
"""What a report shows: the commands of a row are meant with these."""


def server_environment() -> dict[str, str]:
    """Return the environment of a server or a load generator; what the user set stays."""
    usual = ENVIRONMENT if has_gpu() else ENVIRONMENT | CPU_ENVIRONMENT
    return usual | dict(os.environ) | {"VLLM_SERVER_DEV_MODE": "1"}


def describe_conditions() -> dict[str, Any]:
    """Return the machine and what of the servers' environment changes how they run."""
    environment = server_environment()
    shown = {name: environment[name] for name in RECORDED if name in environment}
    return {**describe_machine(), "environment": shown}
