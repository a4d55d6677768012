"""The ablation's one command, from questions to the page, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ablation.__main__ import TABLE_MARKS

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1500)]

SMALL = ("--samples", "32", "--held-out", "7", "--per-family", "1", "--seed", "0")


def run(folder: Path) -> str:
    """Run the command for one arm; returns what it printed."""
    (folder / "page.md").write_text("\n".join(TABLE_MARKS))
    files = {"--work-dir": "work", "--output": "result.json", "--page": "page.md"}
    paths = [part for option, name in files.items() for part in (option, str(folder / name))]
    command = [sys.executable, "-m", "benchmarks.ablation", *SMALL, *paths, "--arm", "eagle_vlm"]
    done = subprocess.run(
        command, env=dict(os.environ), capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_one_command(tmp_path: Path) -> None:
    run(tmp_path)
    (row,) = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert (row["arm"], row["seeds"]) == ("eagle_vlm", [0])
    assert row["identical"] == row["answers_compared"] == 7
    assert row["tokens_per_round"]["image tasks"]["mean"] >= 1.0
    assert row["decode_speedup"]["image tasks"]["mean"] > 0.0
    assert "EagleVLM" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "page.png").is_file()
    # Run again: nothing is trained or measured anew.
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "work" / "cells").iterdir()}
    assert before
    run(tmp_path)
    assert {file: file.stat().st_mtime_ns for file in before} == before
