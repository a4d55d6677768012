"""How much memory the processes of a server hold."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

_QUERY = ("--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")


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
    return _device_bytes(family) or sum(_most_resident_bytes(pid) for pid in family) or None


def _device_bytes(family: list[int]) -> int:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        done = subprocess.run([tool, *_QUERY], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    rows = re.findall(r"^\s*(\d+), *(\d+)\s*$", done.stdout, re.MULTILINE)
    return sum(int(mebibytes) << 20 for pid, mebibytes in rows if int(pid) in family)


def _most_resident_bytes(pid: int) -> int:
    try:
        found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0
