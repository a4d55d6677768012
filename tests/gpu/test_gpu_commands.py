"""`tests.gpu.bare` and `vispec verify` on this machine's GPU, with its vLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.bare import PARTS
from tests.support.child import REPOSITORY

pytestmark = pytest.mark.timeout(900)


def run(output: Path, *arguments: str) -> dict[str, Any]:
    """Run a Python module; what it writes."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments, "--output", str(output)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_every_part_but_those_that_say_why(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    vllm = spec.submodule_search_locations[0]
    assert set(run(tmp_path / "gpu.json", "tests.gpu.bare", "--vllm", vllm)["parts"]) == set(PARTS)


def test_chain_and_tree_are_verified(tmp_path: Path) -> None:
    """With the shipped pair and vLLM's defaults."""
    options = ("--dtype", "bfloat16", "--gpu-memory-utilization", "0.3")
    found = run(tmp_path / "verify.json", "vllm_vispec", "verify", *options)
    states = {one["feature"]: one["state"] for one in found["verdicts"]}
    assert states == {"chain": "passed", "tree": "passed"}
