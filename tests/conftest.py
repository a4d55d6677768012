"""Fixtures of all tests."""

from __future__ import annotations

import pytest

from tests.support.tiny_store import TinyStore


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyStore:
    """Tiny targets and heads, built once per session."""
    return TinyStore(tmp_path_factory.mktemp("tiny"))
