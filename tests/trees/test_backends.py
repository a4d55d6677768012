"""Attention backends that trees may use store keys apart from attention."""

from __future__ import annotations

from importlib import import_module

import pytest

from tools.tables import BACKENDS


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_store_keys_apart(name: str) -> None:
    """Padded keys are stored by the backend's own operator, which all of these have."""
    module, cls, _ = BACKENDS[name]
    backend = getattr(import_module(f"vllm.v1.attention.backends.{module}"), cls)
    assert not backend.forward_includes_kv_cache_update
