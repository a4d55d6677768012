"""What tests of benchmarks with real servers share."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.tiny_vlm.questions import IMAGE_FAMILIES, write_questions
from examples.tiny_vlm.shipped import CHECKPOINTS
from tests.serve.server import ENVIRONMENT


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with questions of the six families."""
    folder = tmp_path_factory.mktemp("questions")
    write_questions(folder, "heldout", 800_000, 12, IMAGE_FAMILIES)
    return folder


@pytest.fixture
def as_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers are started from the repository's root, in the environment of the serving tests."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(CHECKPOINTS.parents[2])
    # The tests' own engines need it; the benchmark's servers decide for themselves.
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
