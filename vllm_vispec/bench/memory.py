"""How much memory the processes of a server hold."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_MIB = 1 << 20
_QUERY = ("--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")


def peak_bytes(leader: int) -> int | None:
    """Return the bytes held by a process and its descendants; None if nothing says it.

    With an NVIDIA GPU it is the device memory they hold now: vLLM allocates all of it at its
    start. Else it is the sum of the most resident memory that each has held.
    """
    family = _family(leader)
    return _device_bytes(family) or _resident_bytes(family)


def _family(leader: int) -> list[int]:
    """Return the process and all its descendants that are still there."""
    import psutil

    try:
        process = psutil.Process(leader)
        return [leader, *(child.pid for child in process.children(recursive=True))]
    except psutil.Error:
        return []


def _device_bytes(family: list[int]) -> int | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        done = subprocess.run(
            [tool, *_QUERY], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [line.split(",") for line in done.stdout.splitlines() if line.count(",") == 1]
    used = [
        int(amount)
        for pid, amount in rows
        if pid.strip().isdigit() and int(pid) in family and amount.strip().isdigit()
    ]
    return sum(used) * _MIB or None


def _resident_bytes(family: list[int]) -> int | None:
    amounts = [_high_water_mark(Path(f"/proc/{pid}/status")) for pid in family]
    return sum(amounts) or None


def _high_water_mark(status: Path) -> int:
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else 0
