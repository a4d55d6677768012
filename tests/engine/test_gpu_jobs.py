"""Rehearses on a CPU the job behind the tests that need a GPU (`tests/gpu/test_gpu_starts.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.setups import mean_accepted, outputs
from tests.gpu.test_gpu_starts import serve, start
from tests.support.runners import V1_ENV
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def test_the_job_serves(tiny: TinyStore, tmp_path: Path) -> None:
    names = ("plain", "chain", "tree")
    starts = [start(name, tiny, tmp_path, "float32", enforce_eager=True) for name in names]
    text = start("chain", tiny, tmp_path, "float32", enforce_eager=True)
    served = serve([*starts, text | {"name": "text", "text_only": True}], dict(V1_ENV))
    for name in names[1:]:
        assert outputs(served[name]) == outputs(served["plain"])
        assert mean_accepted(served[name]) > 0
        assert served[name]["runner"] == "V1"
        assert served[name]["graphs"] == {}
    assert list(outputs(served["text"])) == ["text"]
