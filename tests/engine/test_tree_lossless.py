"""With draft trees, greedy decoding gives what plain vLLM gives with the same settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.engine.setups import (
    FEW_BLOCKS,
    SMALL,
    Served,
    assert_same,
    mean_accepted,
    outputs,
    serve,
    setup,
)
from tests.support.runners import RUNNERS
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
# 16 requests of 3 nodes each are the token budget of 48.
TREE: Mapping[str, Any] = {"tree": {"policy": "eagle2", "depth": 3, "top_k": 3}}
NODES = 19
V1_SMALL: Mapping[str, Any] = {"mixed": {}, "prefix": {}, "abort": {}, "features": {}, "edge": {}}
BUSY: Mapping[str, Any] = {"busy": {"run": "mixed", "count": 20, "max_tokens": 40}}


def _setups(tiny: TinyStore) -> list[dict[str, Any]]:
    target, head = tiny.pair(KIND)
    tree = dict(TREE) | {"draft": head, "num_draft_tokens": NODES}
    return [
        setup(f"{name}-{mode}", KIND, base | {"model": target} | options, scenarios)
        for name, base, scenarios in (
            ("small", dict(SMALL), V1_SMALL),
            ("blocks", dict(FEW_BLOCKS), BUSY),
        )
        for mode, options in (
            ("plain", {}),
            ("tree", tree),
            ("async", tree | {"async_scheduling": True}),
        )
    ]


@pytest.fixture(scope="module")
def v1(tiny: TinyStore) -> Served:
    """Everything that V1 serves, without drafts, with trees, and with two steps in flight."""
    return serve(RUNNERS["v1"], _setups(tiny))


@pytest.mark.parametrize("mode", ["tree", "async"])
@pytest.mark.parametrize("scenario", V1_SMALL)
def test_v1_trees(v1: Served, scenario: str, mode: str) -> None:
    plain, tree = v1["small-plain", scenario], v1[f"small-{mode}", scenario]
    assert set(outputs(plain)) == set(outputs(tree))
    assert_same(plain, tree)
    if mode == "async":
        assert tree["spy"]["in_flight"] == 2


def test_v1_trees_met_what_was_arranged(v1: Served) -> None:
    """Chunk borders cut images, prefix hits ended inside one, and trees were accepted."""
    mixed, prefix = v1["small-tree", "mixed"], v1["small-tree", "prefix"]
    assert mixed["spy"]["split_images"] >= 10
    assert prefix["spy"]["hits_inside_image"] > 0
    assert 0.2 < mean_accepted(mixed) < 4


@pytest.mark.parametrize("mode", ["tree", "async"])
def test_v1_trees_under_preemption(v1: Served, mode: str) -> None:
    plain, tree = v1["blocks-plain", "busy"], v1[f"blocks-{mode}", "busy"]
    assert_same(plain, tree)
    assert tree["metrics"]["vllm:num_preemptions"] > 0


def test_v1_logprobs_of_trees(v1: Served) -> None:
    """Log probabilities of the chosen and the best tokens agree within 1e-4."""
    plain, tree = (v1[f"small-{mode}", "features"]["results"] for mode in ("plain", "tree"))
    names = [name for name in plain if name.startswith("logprobs")]
    assert names
    for name in names:
        rows = list(zip(plain[name][0]["logprobs"], tree[name][0]["logprobs"], strict=True))
        assert len(rows) == 48
        for expected, found in rows:
            assert found == pytest.approx(expected, abs=1e-4)
