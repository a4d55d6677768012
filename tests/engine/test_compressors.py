"""Heads with compressors: lossless, and drafting what the PyTorch draft drafts, in every situation.

Every primitive is a branch of a combination here; `test_golden_compressors` has each by itself. The
gates of these random heads are strong, so that requests differ in what they choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.setups import params
from tests.support.child import run_in_subprocess
from tests.support.runners import RUNNERS, Runner
from tests.support.tiny_heads import HeadSpec
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800), pytest.mark.slow]

KIND = "qwen2_5_vl"
TOLERANCE = 1e-4
# Images have 4 to 16 tokens; the smallest have fewer than some heads make of them.
HEADS = {
    "resampler": ("resampler:5", False),
    "text_only": ("text_only", False),
    "concat": ("concat(prune:4,pool:4,conv:3,resampler:2)", True),
    "weighted": ("weighted(prune:3,pool:3,conv:3)", False),
    "select": ("select(prune:2,pool:4,conv:3,resampler:2,text_only)", True),
}
GATED = ("weighted", "select")
# Split prompts, alone; and with others that preempt each other.
THOROUGH = {"roomy": ["prefix_hit"], "tight": ["chunked", "together"]}
BRIEF = {"roomy": ["prefix_hit"], "tight": ["together"]}
Found = dict[str, dict[str, Any]]


def _serve(
    tiny: TinyStore,
    runner: Runner,
    names: Sequence[str],
    thorough: dict[str, dict[str, list[str]]],
    count: int,
) -> Found:
    spec = HeadSpec(KIND, 1, dialect="canonical")
    heads = {
        name: str(tiny.head(replace(spec, compressor=compressor, global_feature=global_feature)))
        for name, (compressor, global_feature) in HEADS.items()
        if name in names
    }
    kwargs = {
        "kind": KIND,
        "target": str(tiny.target(KIND)),
        "heads": heads,
        "situations": ["together"],
        "thorough": thorough,
        "count": count,
    }
    items = run_in_subprocess("tests.engine.kinds_jobs:serve", kwargs, runner.env(), timeout=1500)
    return {item["head"]: item for item in items}


@pytest.fixture(scope="module")
def all_heads(tiny: TinyStore) -> Found:
    """All heads on V1; the most demanding ones with prompts split and requests preempted."""
    thorough = dict.fromkeys(("concat", "select"), THOROUGH)
    return _serve(tiny, RUNNERS["v1"], tuple(HEADS), thorough, count=1)


@pytest.fixture(scope="module", params=params("v2", "v2-overlay"))
def elsewhere(request: pytest.FixtureRequest, tiny: TinyStore) -> Found:
    """Gated branches, all of them in the cache, on other runners and releases."""
    return _serve(tiny, request.param, ["select"], {"select": BRIEF}, count=0)


def _assert_sound(item: dict[str, Any]) -> None:
    """Lossless everywhere; drafts as in PyTorch, and the same whatever else goes on."""
    assert item["cold_same"]
    assert sum(sum(rounds) for rounds in item["accepted"].values()) > 0
    assert item["torch_gap"] < TOLERANCE
    # A draft that sees nothing of images drafts as if they were blank, all others do not.
    assert (item["blind_gap"] > 100 * TOLERANCE) == (item["head"] != "text_only")
    for situation, served in item["situations"].items():
        assert served["same"], situation
        assert served["table"]["misses"] == 0, situation
        for request, row in served["requests"].items():
            assert row["gap"] < TOLERANCE, (situation, request)
            assert row["shared"] > 0, (situation, request)
            # A round that is cut short by a preemption is none that was there before.
            if not served["spy"]["preempted"]:
                assert row["accepted"] == row["cold_accepted"], (situation, request)
                assert row["shared"] == row["cold_keys"], (situation, request)


def _assert_thorough(item: dict[str, Any]) -> None:
    """The situations were what their names say."""
    found = item["situations"]
    hits = found["roomy-prefix_hit"]["requests"].values()
    assert sum(row["cached"] > 0 for row in hits) >= 2
    assert found["tight-together"]["spy"]["split_images"] > 0
    assert found["tight-together"]["spy"]["preempted"]


def _assert_varied(item: dict[str, Any]) -> None:
    """Requests differ in what the gate decides for them."""
    codes = {tuple(code) for code in item["choices"].values()}
    assert len(codes) > 1


@pytest.mark.parametrize("name", HEADS)
def test_compressor(all_heads: Found, name: str) -> None:
    _assert_sound(all_heads[name])
    assert bool(all_heads[name]["choices"]) == (name in GATED)


@pytest.mark.parametrize("name", GATED)
def test_gates_decide_for_each_request(all_heads: Found, name: str) -> None:
    _assert_varied(all_heads[name])


@pytest.mark.parametrize("name", ["concat", "select"])
def test_compressor_in_every_situation(all_heads: Found, name: str) -> None:
    _assert_thorough(all_heads[name])
    chunked = all_heads[name]["situations"]["tight-chunked"]["spy"]
    assert chunked["split_images"] > 0
    assert not chunked["preempted"]


def test_compressors_elsewhere(elsewhere: Found) -> None:
    (item,) = elsewhere.values()
    _assert_sound(item)
    _assert_varied(item)
    _assert_thorough(item)
