"""After a sleep of level 2, whose memory comes back with anything in it, outputs are the same."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.setups import outputs, params
from tests.support.child import run_in_subprocess
from tests.support.runners import Runner
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
TREE = {"num_draft_tokens": 19, "tree": {"policy": "eagle2", "depth": 3, "top_k": 3}}


def _rounds(results: dict[str, list[dict[str, Any]]]) -> dict[str, list[int]]:
    return {name: found[0]["accepted_draft"] for name, found in results.items()}


@pytest.mark.parametrize("runner", params("v1", "v2"))
def test_sleeping_changes_nothing(runner: Runner, tiny: TinyStore) -> None:
    target, head = tiny.pair(KIND)
    options = {"model": target, "draft": head, "max_num_batched_tokens": 128}
    setups = [
        {"name": "chain", "options": options},
        {"name": "tree", "options": options | TREE},
    ]
    kwargs = {"kind": KIND, "setups": setups, "count": 4, "max_tokens": 8}
    items = run_in_subprocess("tests.engine.sleep_jobs:sleep_and_wake", kwargs, runner.env(), 1500)
    for item in items:
        assert outputs(item) == outputs({"results": item["before"]}), item["name"]
        assert _rounds(item["results"]) == _rounds(item["before"]), item["name"]
        assert sum(map(sum, _rounds(item["results"]).values())) > 0
