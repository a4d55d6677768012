"""A tree in a row on the attention kernel that runs here, against float64 under a dense mask.

Errors seen (CPU kernel, prefix of 437 tokens, 30 rows): see the bounds.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.child import run_in_subprocess
from tests.support.runners import V1_ENV
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

KIND = "qwen2_5_vl"


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_padded_row(tiny: TinyStore, dtype: str, error: float) -> None:
    target, head = tiny.pair(KIND)
    options: dict[str, Any] = {
        "model": target,
        "draft": head,
        "num_draft_tokens": 29,
        "tree": {"policy": "eagle2"},
        "num_blocks": 40,
        "extra": {"dtype": dtype},
    }
    found = run_in_subprocess(
        "tests.engine.tree_attention_jobs:measure", {"options": options}, V1_ENV
    )[0]
    assert found["path"] >= 3
    assert found["tree"] <= error
    assert found["tree"] <= 2 * found["plain"]
    assert found["stored_again"] == 0, "the cache must be what plain decoding leaves"
