"""With every compressor, greedy decoding gives what plain vLLM gives with the same settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.engine.setups import (
    BUSY,
    FEW_BLOCKS,
    SMALL,
    Served,
    assert_same,
    mean_accepted,
    serve,
    setup,
)
from tests.support.runners import RUNNERS
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
SELECT = "select(prune:2,pool:4,conv:3,resampler:2,text_only)"
# Compressor, and whether there is a global feature. Images have 4 to 16 tokens.
HEADS: Mapping[str, tuple[str, bool]] = {
    "prune": ("prune:3", False),
    "pool": ("pool:4", False),
    "conv": ("conv:3", False),
    "resampler": ("resampler:5", False),
    "text_only": ("text_only", False),
    "concat": ("concat(prune:4,pool:4,conv:3,resampler:2)", False),
    "weighted": ("weighted(prune:3,pool:3,conv:3)", False),
    "select": (SELECT, False),
    "prune + global": ("prune:3", True),
    "select + global": (SELECT, True),
}
BRIEF: Mapping[str, Any] = {"mixed": {"count": 16}, "prefix": {}}
WHOLE: Mapping[str, Any] = dict(BRIEF) | {"abort": {}, "features": {}, "edge": {}}
# The one whose state is the most there is: everything, and under preemption.
THOROUGH = "select + global"


@pytest.fixture(scope="module")
def served(tiny: TinyStore) -> Served:
    """Plain vLLM and every compressor, on V1."""
    target = str(tiny.target(KIND))
    heads: dict[str, dict[str, Any]] = {"plain": {}}
    for name, (compressor, global_feature) in HEADS.items():
        head = {"compressor": compressor, "global_feature": global_feature}
        pair = tiny.pair(KIND, num_q=1, dialect="canonical", **head)
        heads[name] = {"draft": pair[1]}
    setups = []
    for name, draft in heads.items():
        in_full = name in ("plain", THOROUGH)
        small = dict(SMALL) | {"model": target} | draft
        setups.append(setup(name, KIND, small, WHOLE if in_full else BRIEF))
        if in_full:
            blocks = dict(FEW_BLOCKS) | {"model": target} | draft
            setups.append(setup(f"{name}, blocks", KIND, blocks, BUSY))
    return serve(RUNNERS["v1"], setups)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("scenario", BRIEF)
def test_compressors(served: Served, scenario: str, name: str) -> None:
    found = served[name, scenario]
    assert_same(served["plain", scenario], found)
    assert mean_accepted(found) > 0.1
    if scenario == "mixed":
        assert found["spy"]["split_images"] > 0
    else:
        assert found["spy"]["hits_inside_image"] > 0


@pytest.mark.parametrize("scenario", [name for name in WHOLE if name not in BRIEF])
def test_thoroughly(served: Served, scenario: str) -> None:
    assert_same(served["plain", scenario], served[THOROUGH, scenario])


def test_under_preemption(served: Served) -> None:
    found = served[f"{THOROUGH}, blocks", "busy"]
    assert_same(served["plain, blocks", "busy"], found)
    assert found["metrics"]["vllm:num_preemptions"] > 0
