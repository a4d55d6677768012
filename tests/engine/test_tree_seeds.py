"""V2 with trees draws what plain decoding draws: the same tokens from the same seeds.

V2 keys a draw by a request's seed and the position of the token, so that a tree whose nodes have
the positions of their levels meets the draws plain decoding would have made.
"""

from __future__ import annotations

import pytest

from tests.engine.setups import outputs, params
from tests.support.child import run_in_subprocess
from tests.support.runners import Runner
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
COUNT = 6


@pytest.mark.parametrize("runner", params("v2"))
def test_same_seeds_same_tokens(runner: Runner, tiny: TinyStore) -> None:
    target, head = tiny.pair(KIND)
    options = {"model": target, "max_num_batched_tokens": 128}
    tree = {"draft": head, "num_draft_tokens": 29, "tree": {"policy": "eagle2"}}
    setups = [
        {"name": "plain", "options": options},
        {"name": "tree", "options": options | tree},
    ]
    kwargs = {"kind": KIND, "setups": setups, "count": COUNT, "max_tokens": 10}
    items = run_in_subprocess(
        "tests.engine.tree_seed_jobs:sample_with_seeds", kwargs, runner.env(), 1500
    )
    plain, found = (outputs(item) for item in items)
    assert found == plain
    assert len({str(tokens) for tokens in plain.values()}) == COUNT
    rounds = [n for row in items[1]["results"].values() for n in row[0]["accepted_draft"]]
    assert sum(rounds) > 0
