"""What all benchmarks share: the JSON file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WHOLE = 1e5  # digits before the point all stay
_INNERMOST = re.compile(r'[\[{](?:[^][{}"]|"(?:[^"\\]|\\.)*")*[\]}]')


def write_report(file: Path, content: Mapping[str, Any]) -> None:
    """Write a report as JSON: five digits of each number, innermost lists and objects on a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(content), indent=1)
    text = _INNERMOST.sub(lambda found: " ".join(found.group().split()), text)
    file.write_text(text + "\n", encoding="utf-8")
    print(f"written: {file}")


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    if isinstance(value, float) and abs(value) < _WHOLE:
        return float(f"{value:.5g}")
    return value
