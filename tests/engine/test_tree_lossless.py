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


def _setups(
    tiny: TinyStore, small: Mapping[str, Any], busy: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the setups of both engines: plain, with trees, and with two steps in flight."""
    target, head = tiny.pair(KIND)
    tree = dict(TREE) | {"draft": head, "num_draft_tokens": NODES}
    return [
        setup(f"{name}-{mode}", KIND, base | {"model": target} | options, scenarios)
        for name, base, scenarios in (
            ("small", dict(SMALL), small),
            ("blocks", dict(FEW_BLOCKS), busy),
        )
        for mode, options in (
            ("plain", {}),
            ("tree", tree),
            ("async", tree | {"async_scheduling": True}),
        )
    ]


@pytest.fixture(scope="module")
def v1(tiny: TinyStore) -> Served:
    """Everything that V1 serves."""
    return serve(RUNNERS["v1"], _setups(tiny, V1_SMALL, BUSY))


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


OTHERS: Mapping[str, tuple[str, bool, list[pytest.MarkDecorator]]] = {
    "v2": ("v2", False, [pytest.mark.v2]),
    "v2-full": ("v2", True, [pytest.mark.v2, pytest.mark.slow]),
    "v1-overlay": ("v1-overlay", True, [pytest.mark.overlay]),
    "v2-overlay": ("v2-overlay", True, [pytest.mark.v2, pytest.mark.overlay]),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param((name, full), id=id_, marks=m) for id_, (name, full, m) in OTHERS.items()],
)
def other(request: pytest.FixtureRequest, tiny: TinyStore) -> Served:
    """The shorter lists of the other runners; V2 by default without the long ones."""
    name, full = request.param
    mixed = {"count": 64 if full else 16, "max_tokens": 6}
    small: dict[str, Any] = {"mixed": mixed, "prefix": {}}
    if full:
        small |= {"features": {}, "edge": {}}
    setups = _setups(
        tiny, small, {"busy": {"run": "mixed", "count": 10, "max_tokens": 40}} if full else {}
    )
    return serve(RUNNERS[name], [setup for setup in setups if setup["scenarios"]])


def test_trees_on_other_runners(other: Served) -> None:
    compared = 0
    for (engine, scenario), served in other.items():
        name, _, mode = engine.partition("-")
        if mode != "plain":
            assert_same(other[f"{name}-plain", scenario], served)
            compared += 1
    assert compared >= 4
    assert other["small-tree", "prefix"]["metrics"]["vllm:prefix_cache_hits"] > 0
    assert other["small-async", "mixed"]["spy"]["in_flight"] == 2
