"""What tests of benchmarks with real servers share."""

from __future__ import annotations

import pytest

from examples.tiny_vlm.shipped import CHECKPOINTS
from tests.serve.server import ENVIRONMENT


def serve_as_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start servers from the repository's root, in the environment of the serving tests."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(CHECKPOINTS.parents[2])
    # The tests' own engines need it; the benchmark's servers decide for themselves.
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
