"""The page of patch points is the one in the code."""

import os
import re
from pathlib import Path

from vllm_vispec.compat.groups import GROUPS
from vllm_vispec.compat.patch_point import PatchGroup, PatchPoint, Runner

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
SECTION = re.compile(r"(<!-- patch-points: [^>]*-->\n).*?(<!-- /patch-points -->)", re.DOTALL)
HEADER = "| patch point | runner | expected parameters | use | why | versions |"


def page_section() -> str:
    return "".join(_group_table(group) for group in GROUPS)


def _group_table(group: PatchGroup) -> str:
    runners: tuple[Runner, ...] = ("v2", "v1")
    rows = [HEADER, "|---|---|---|---|---|---|"]
    rows += [_row(point, "both") for point in group.common]
    for runner in runners:
        rows += [_row(point, runner.upper()) for point in group.points_of(runner)]
    title = group.name[0].upper() + group.name[1:]
    return f"\n## {title}\n\nNeeded for: {group.feature}.\n\n" + "\n".join(rows) + "\n\n"


def _row(point: PatchPoint, runner: str) -> str:
    parameters = ", ".join(point.parameters) or "-"
    cells = f"`{point.name}`", runner, parameters, point.use, point.reason
    return f"| {' | '.join(cells)} | {', '.join(point.versions)} |"


def test_patch_points_page_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    found = SECTION.search(text)
    assert found is not None
    if os.environ.get("VISPEC_WRITE_README"):
        PAGE.write_text(SECTION.sub(lambda m: m[1] + page_section() + m[2], text), "utf-8")
        return
    assert found[0] == found[1] + page_section() + found[2]
