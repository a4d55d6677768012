"""With draft trees, greedy decoding gives what plain vLLM gives with the same settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest

from tests.engine.setups import (
    BUSY,
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


class Other(NamedTuple):
    """What another runner serves.

    Attributes:
        runner: Its name.
        small: Scenarios of the roomy engines.
        busy: Scenarios under preemption.
    """

    runner: str
    small: Mapping[str, Any]
    busy: Mapping[str, Any] = {}


# V2 runs in Triton's interpreter, which refuses vLLM's kernels of top_p ("n") and grammars.
V2_FEATURES = ("stop", "logprobs", "penalty", "words")
FEW: Mapping[str, Any] = {"mixed": {"count": 12, "max_tokens": 6}, "prefix": {}}
V2_WHOLE: Mapping[str, Any] = dict(FEW) | {"features": {"names": V2_FEATURES}}
PREEMPTED: Mapping[str, Any] = {"busy": {"run": "mixed", "count": 8, "max_tokens": 40}}
OTHERS: Mapping[str, tuple[Other, list[pytest.MarkDecorator]]] = {
    "v2": (Other("v2", V2_WHOLE, PREEMPTED), [pytest.mark.v2, pytest.mark.slow]),
    "v1-overlay": (
        Other("v1-overlay", dict(V1_SMALL) | {"mixed": {"count": 16}}, PREEMPTED),
        [pytest.mark.overlay],
    ),
    "v2-overlay": (
        Other("v2-overlay", dict(FEW) | {"edge": {}}),
        [pytest.mark.v2, pytest.mark.overlay],
    ),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(other, id=id_, marks=marks) for id_, (other, marks) in OTHERS.items()],
)
def other(request: pytest.FixtureRequest, tiny: TinyStore) -> Served:
    """The shorter lists of the other runners."""
    wanted: Other = request.param
    # Two steps in flight under preemption are V1's business above.
    setups = _setups(tiny, wanted.small, wanted.busy)
    setups = [one for one in setups if one["scenarios"] and one["name"] != "blocks-async"]
    for one in setups:
        if one["name"] == "small-async":
            one["scenarios"] = {"mixed": wanted.small["mixed"]}
    return serve(RUNNERS[wanted.runner], setups)


def test_trees_on_other_runners(other: Served) -> None:
    compared = set()
    for (engine, scenario), served in other.items():
        name, _, mode = engine.partition("-")
        if mode != "plain":
            assert_same(other[f"{name}-plain", scenario], served)
            compared.add((mode, scenario))
    assert {("tree", "mixed"), ("tree", "prefix")} <= compared
    assert other["small-tree", "prefix"]["metrics"]["vllm:prefix_cache_hits"] > 0
    assert other["small-async", "mixed"]["spy"]["in_flight"] == 2
    if ("tree", "busy") in compared:
        assert other["blocks-tree", "busy"]["metrics"]["vllm:num_preemptions"] > 0
