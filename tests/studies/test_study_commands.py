"""The one commands of the ablation and of the compressors, from questions to the page, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1500)]

SMALL = ("--samples", "32", "--held-out", "7", "--per-family", "1", "--seed", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both commands ask the same questions."""
    return tmp_path_factory.mktemp("studies")


def run(folder: Path, module: str, *more: str) -> dict[str, Any]:
    """Run the command for one variant; returns its row."""
    (folder / "page.md").write_text("<!-- tables: here -->\n<!-- /tables -->\n")
    files = {"--work-dir": "work", "--output": "result.json", "--page": "page.md"}
    paths = [part for option, name in files.items() for part in (option, str(folder / name))]
    command = [sys.executable, "-m", module, *SMALL, *paths, *more]
    done = subprocess.run(
        command, env=dict(os.environ), capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    (row,) = json.loads((folder / "result.json").read_text())["rows"]
    return dict(row)


def check(row: dict[str, Any]) -> None:
    """What must hold for every variant in the engine."""
    assert row["seeds"] == [0]
    assert row["identical"] == row["answers_compared"] == 7
    assert row["acceptance_length"]["image tasks"]["mean"] >= 1.0
    assert row["decode_speedup"]["image tasks"]["mean"] > 0.0


def test_one_command(folder: Path) -> None:
    command = ("benchmarks.ablation", "--variant", "eagle_vlm")
    row = run(folder, *command)
    check(row)
    assert row["variant"] == "eagle_vlm"
    assert "EagleVLM" in (folder / "page.md").read_text()
    assert (folder / "page.png").is_file()
    # Run again: nothing is trained or measured anew.
    before = {file: file.stat().st_mtime_ns for file in (folder / "work" / "cells").iterdir()}
    assert before
    run(folder, *command)
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_command_of_the_compressors(folder: Path) -> None:
    row = run(folder, "benchmarks.compressors", "--variant", "weighted")
    check(row["engine"])
    assert row["name"] == "weighted-e2-s0"
    assert row["replayed"]["mean"] >= 1.0
    assert sum(sum(one["counts"]) for one in row["choices"]) == 7
    assert "| weighted | " in (folder / "page.md").read_text()
