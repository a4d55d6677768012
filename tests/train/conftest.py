"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.runs import write_dialogues


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of short dialogues with zero to two images."""
    return write_dialogues(tmp_path_factory.mktemp("dialogues"), 24)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # sums depend on the number of threads
