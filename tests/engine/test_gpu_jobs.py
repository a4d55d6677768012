"""Rehearses on a CPU what the tests that need a GPU do (`tests/gpu/test_gpu_starts.py`)."""

from __future__ import annotations

import pytest

from tests.gpu.test_gpu_starts import SOME, assert_same, serve, start
from tests.support.engine import StartProcess
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def test_the_job_serves(child: StartProcess, tiny: TinyStore) -> None:
    starts = {name: start(name, tiny, "float32", enforce_eager=True) for name in SOME}
    served = serve(child("v1"), starts)
    assert_same(served)
    for name in SOME[1:]:
        assert served[name].runner == "V1"
        assert served[name].graphs == {}
    text = serve(child("v1"), {"chain": starts["chain"]}, text_only=True)["chain"]
    assert list(text.served.outputs()) == ["text"]
