"""Trees on V2 start as GPUs start them: vLLM profiles its memory before keys have a place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.engine.setups import assert_same, mean_accepted, params, setup
from tests.support.child import run_in_subprocess
from tests.support.runners import Runner
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
# What an engine may take of this machine; enough for what the process has already.
GIB = 4


def _share_of_memory() -> float:
    import psutil

    return GIB * 2**30 / psutil.virtual_memory().total


@pytest.mark.parametrize("runner", params("v2", "v2-overlay"))
def test_trees_start_without_a_size_of_the_cache(runner: Runner, tiny: TinyStore) -> None:
    target, head = tiny.pair(KIND)
    options = {
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "model": target,
        "extra": {"gpu_memory_utilization": _share_of_memory()},
    }
    tree = {"draft": head, "num_draft_tokens": 19, "tree": {"policy": "eagle2", "top_k": 3}}
    scenarios = {"mixed": {"count": 6, "max_tokens": 6}}
    modes: Mapping[str, dict[str, Any]] = {"plain": {}, "tree": tree}
    setups = [setup(name, KIND, options | more, scenarios) for name, more in modes.items()]
    items = run_in_subprocess(
        "tests.engine.tree_profile_jobs:serve", {"setups": setups}, runner.env(), 900
    )
    plain, found = items
    assert_same(plain, found)
    assert mean_accepted(found) > 0.2
