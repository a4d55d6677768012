"""What `tests.gpu.bare` asks, on this machine's GPU and with the kernels of its vLLM."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.bare import PARTS
from tests.support.child import REPOSITORY

pytestmark = pytest.mark.timeout(600)


def test_every_part(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "tests.gpu.bare", "--output", str(output)]
    command += ["--vllm", spec.submodule_search_locations[0]]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    parts = json.loads(output.read_text())["parts"]
    failed = {name: part for name, part in parts.items() if part["state"] == "failed"}
    assert not failed, failed
    assert done.returncode == 0
    assert set(parts) == set(PARTS)
