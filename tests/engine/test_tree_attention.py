"""A tree in a row on the attention kernel that runs here, against float64 under a dense mask.

A prefix of 437 tokens, 30 rows, 8 heads over 2 key/value heads; errors seen are below the bounds.
"""

from __future__ import annotations

import pytest

from tests.support.child import run_in_subprocess
from tests.support.runners import V1_ENV

ERRORS = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize(("head_size", "padded"), [(64, 96), (128, 160)])
def test_padded_row(head_size: int, padded: int, dtype: str) -> None:
    kwargs = {"head_size": head_size, "dtype": dtype}
    found = run_in_subprocess("tests.engine.tree_attention_jobs:measure", kwargs, V1_ENV)[0]
    assert found["padded"] == padded
    assert found["path"] >= 3
    assert found["tree"] <= ERRORS[dtype]
    assert found["tree"] <= 2 * found["plain"]
    assert found["stored_again"] == 0, "the cache must be what plain decoding leaves"
