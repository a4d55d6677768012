"""The README's seams table is the one in the code."""

import os
import re
from pathlib import Path

from vllm_vispec.seams import SEAMS

README = Path(__file__).resolve().parents[2] / "README.md"
SECTION = re.compile(r"(<!-- seams: [^>]*-->\n).*?(<!-- /seams -->)", re.DOTALL)


def seams_table() -> str:
    rows = ["| symbol | expected parameters | use | why | versions |", "|---|---|---|---|---|"]
    for seam in SEAMS:
        parameters = ", ".join(seam.parameters) or "-"
        versions = ", ".join(seam.versions)
        rows.append(f"| `{seam.name}` | {parameters} | {seam.use} | {seam.reason} | {versions} |")
    return "\n".join(rows) + "\n"


def test_seams_table_is_current() -> None:
    text = README.read_text(encoding="utf-8")
    found = SECTION.search(text)
    assert found is not None
    if os.environ.get("VISPEC_WRITE_README"):
        README.write_text(SECTION.sub(lambda m: m[1] + seams_table() + m[2], text), "utf-8")
        return
    assert found[0] == found[1] + seams_table() + found[2]
