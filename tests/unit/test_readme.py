"""The README's table of patch points is the one in the code."""

import os
import re
from pathlib import Path

from vllm_vispec.compat.check import PATCH_POINTS

README = Path(__file__).resolve().parents[2] / "README.md"
SECTION = re.compile(r"(<!-- patch-points: [^>]*-->\n).*?(<!-- /patch-points -->)", re.DOTALL)


def patch_points_table() -> str:
    rows = ["| symbol | expected parameters | use | why | versions |", "|---|---|---|---|---|"]
    for point in PATCH_POINTS:
        parameters = ", ".join(point.parameters) or "-"
        versions = ", ".join(point.versions)
        rows.append(
            f"| `{point.name}` | {parameters} | {point.use} | {point.reason} | {versions} |"
        )
    return "\n".join(rows) + "\n"


def test_patch_points_table_is_current() -> None:
    text = README.read_text(encoding="utf-8")
    found = SECTION.search(text)
    assert found is not None
    if os.environ.get("VISPEC_WRITE_README"):
        README.write_text(SECTION.sub(lambda m: m[1] + patch_points_table() + m[2], text), "utf-8")
        return
    assert found[0] == found[1] + patch_points_table() + found[2]
