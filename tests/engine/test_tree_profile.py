"""Trees start as GPUs start them, memory profile first, and in engines of little room.

vLLM profiles before keys and values have a place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.engine.setups import Served, assert_same, mean_accepted, params, setup
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


@pytest.fixture(scope="module", params=params("v1", "v2", "v2-overlay", slow=["v1"]))
def served(request: pytest.FixtureRequest, tiny: TinyStore) -> Served:
    """Plain decoding and trees, in engines of little room, without a given size of the cache."""
    target, head = tiny.pair(KIND)
    options = {
        "max_model_len": 256,
        "max_num_seqs": 12,
        # Room for a level of 8 trees: in a step of 12 prompts they are grown in parts.
        "max_num_batched_tokens": 32,
        "model": target,
        "extra": {"gpu_memory_utilization": _share_of_memory()},
    }
    tree = {"draft": head, "num_draft_tokens": 19, "tree": {"policy": "eagle2", "top_k": 4}}
    scenarios = {"mixed": {"count": 6, "max_tokens": 6}, "short": {}}
    modes: Mapping[str, dict[str, Any]] = {"plain": {}, "tree": tree}
    setups = [setup(name, KIND, options | more, scenarios) for name, more in modes.items()]
    runner: Runner = request.param
    items = run_in_subprocess(
        "tests.engine.tree_profile_jobs:serve", {"setups": setups}, runner.env(), 900
    )
    return {(item["setup"], item["scenario"]): item for item in items}


@pytest.mark.parametrize("scenario", ["mixed", "short"])
def test_trees_in_engines_that_profiled_their_memory(served: Served, scenario: str) -> None:
    tree = served["tree", scenario]
    assert_same(served["plain", scenario], tree)
    assert mean_accepted(tree) > 0.2


def test_trees_were_grown_in_parts(served: Served) -> None:
    """Trees of 12 prompts of one step took more passes than the levels of one batch."""
    assert served["tree", "short"]["most_parts"] > 1
