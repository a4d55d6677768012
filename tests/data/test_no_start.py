"""`vispec regenerate` with an engine that does not start: one line with cause and option."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.fakes import record
from tests.serve.server import ENVIRONMENT
from tests.support.child import REPOSITORY
from tests.support.tiny_store import TinyStore


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_line(tiny: TinyStore, pictures: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", str(tiny.target("qwen2_5_vl"))
    source.write_text(json.dumps(record("s0", image=str(pictures / "a.png"))) + "\n")
    files = ["--input", str(source), "--output", str(tmp_path / "out"), "--target", target]
    # No machine has all of its memory free.
    more = ["--max-model-len", "256", "--engine", '{"gpu_memory_utilization": 1.0}']
    env = {name: value for name, value in ENVIRONMENT.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    done = subprocess.run(
        [sys.executable, "-m", "vllm_vispec", "regenerate", *files, *more],
        capture_output=True,
        text=True,
        env=os.environ | env | {"PYTHONPATH": str(REPOSITORY)},
        timeout=280,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"vispec: the engine does not start with target {target}: ")
    assert "memory utilization" in last
    option = r"""lower gpu_memory_.*--engine '\{"gpu_memory_utilization": 0\.\d\d\}'"""
    assert re.search(option, last)
    Path(last.rpartition("(whole log: ")[2].removesuffix(")")).unlink()
