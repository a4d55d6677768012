"""What all benchmarks share: intervals and the JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeVar

RESAMPLES = 2000
Item = TypeVar("Item")


def bootstrap_interval(
    items: Sequence[Item], statistic: Callable[[Sequence[Item]], float]
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a statistic over independent items."""
    generator = Random(0)
    values = sorted(statistic(generator.choices(items, k=len(items))) for _ in range(RESAMPLES))
    return values[int(0.025 * RESAMPLES)], values[int(0.975 * RESAMPLES)]


def write_report(file: Path, content: Mapping[str, Any]) -> None:
    """Write a report as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written: {file}")
