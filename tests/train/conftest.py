"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.dialogues import write_dialogues


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of short dialogues with zero to two images."""
    return write_dialogues(tmp_path_factory.mktemp("dialogues"), 24)
