"""What tests of benchmarks share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from examples.tiny_vlm.questions import IMAGE_FAMILIES, write_questions
from examples.tiny_vlm.shipped import CHECKPOINTS
from tests.bench.fakes import World
from tests.serve.server import ENVIRONMENT
from vllm_vispec.bench import runner
from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.runner import Outcome, run_matrix
from vllm_vispec.bench.schema import BenchSample


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


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Stand-ins for everything that the commands start."""
    world = World()

    def run(
        settings: MatrixSettings, samples: Sequence[BenchSample], output: Path, *_: Any
    ) -> Outcome:
        return run_matrix(settings, samples, output, tools=world.tools())

    monkeypatch.setattr(runner, "run_matrix", run)
    return world


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file with four questions of two families."""
    file = tmp_path / "questions.jsonl"
    records = [
        {"id": f"s{i}", "family": f"f{i % 2}", "messages": [{"role": "user", "content": f"q {i}"}]}
        for i in range(4)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file
