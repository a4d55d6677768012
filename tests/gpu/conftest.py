"""Tests that need a GPU are collected where there is one; see `make test-gpu`."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny_store import TinyStore

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyStore:
    """Tiny targets and heads, built once per session."""
    return TinyStore(tmp_path_factory.mktemp("tiny"))
