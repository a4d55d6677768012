"""`vispec verify` on this machine's GPU, with the shipped pair and vLLM's defaults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.child import REPOSITORY

pytestmark = pytest.mark.timeout(900)


def test_chain_and_tree_pass(tmp_path: Path) -> None:
    output = tmp_path / "verify.json"
    command = [sys.executable, "-m", "vllm_vispec", "verify", "--output", str(output)]
    done = subprocess.run(
        [*command, "--dtype", "bfloat16", "--gpu-memory-utilization", "0.3"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    states = {one["feature"]: one["state"] for one in found["verdicts"]}
    assert states == {"chain": "passed", "tree": "passed"}
