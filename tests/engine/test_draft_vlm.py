"""A draft VLM, narrower than its target: lossless as chain and as tree, and what PyTorch drafts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.engine.setups import (
    FEW_BLOCKS,
    SMALL,
    Served,
    assert_same,
    mean_accepted,
    params,
    serve,
    setup,
)
from tests.support.child import run_in_subprocess
from tests.support.runners import RUNNERS, Runner
from tests.support.tiny_configs import VOCAB
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
TOLERANCE = 1e-4
CHAIN: Mapping[str, Any] = {"num_draft_tokens": 4}
TREE: Mapping[str, Any] = {
    "num_draft_tokens": 19,
    "tree": {"policy": "eagle2", "depth": 3, "top_k": 3},
}
# The second of each pair has two steps in flight; with few blocks requests preempt each other.
MODES: Mapping[str, Mapping[str, Any]] = {
    "small-chain": CHAIN,
    "small-tree": {**TREE, "async_scheduling": True},
    "blocks-chain": {**CHAIN, "async_scheduling": True},
    "blocks-tree": TREE,
}
BASES: Mapping[str, Mapping[str, Any]] = {"small": SMALL, "blocks": FEW_BLOCKS}
Found = dict[str, dict[str, Any]]


def _setups(tiny: TinyStore, scenarios: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the setups of the bases that ``scenarios`` names: plain, chain and tree."""
    target, draft = tiny.draft_vlm(KIND)
    found = []
    for base, wanted in scenarios.items():
        options = {**BASES[base], "model": target}
        found.append(setup(f"{base}-plain", KIND, options, wanted))
        for mode, extra in MODES.items():
            if mode.startswith(base):
                found.append(setup(mode, KIND, {**options, "draft": draft, **extra}, wanted))
    return found


@pytest.fixture(scope="module")
def v1(tiny: TinyStore) -> Served:
    """Everything that V1 serves."""
    small: dict[str, Any] = {"mixed": {"count": 24}, "prefix": {}}
    busy = {"busy": {"run": "mixed", "count": 16, "max_tokens": 40}}
    setups = _setups(tiny, {"small": small, "blocks": busy})
    return serve(RUNNERS["v1"], [*setups, _few_tokens(tiny)])


def _few_tokens(tiny: TinyStore) -> dict[str, Any]:
    """Return the setup of a chain that drafts from two thirds of the vocabulary."""
    target, draft = tiny.draft_vlm(KIND)
    vocab = Path(draft) / "two_thirds.json"
    vocab.write_text(json.dumps([token for token in range(VOCAB) if token % 3]))
    config = {
        "method": "vispec",
        "model": draft,
        "num_speculative_tokens": CHAIN["num_draft_tokens"],
        "draft_vocab": str(vocab),
    }
    extra = {**SMALL["extra"], "speculative_config": config}
    options = {**SMALL, "model": target, "draft": draft, "extra": extra}
    return setup("small-vocab", KIND, options, {"mixed": {"count": 24}})


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["chain", "tree"])
@pytest.mark.parametrize("scenario", ["mixed", "prefix"])
def test_v1_is_lossless(v1: Served, scenario: str, mode: str) -> None:
    served = v1[f"small-{mode}", scenario]
    assert_same(v1["small-plain", scenario], served)
    assert mean_accepted(served) > 0.3
    assert served["table"]["misses"] == 0


@pytest.mark.slow
def test_v1_drafts_from_some_tokens(v1: Served) -> None:
    """Rows of its own lm_head, not of the target's."""
    served = v1["small-vocab", "mixed"]
    assert_same(v1["small-plain", "mixed"], served)
    assert 0.1 < mean_accepted(served) < mean_accepted(v1["small-chain", "mixed"])


@pytest.mark.slow
def test_v1_met_what_was_arranged(v1: Served) -> None:
    """Chunk borders cut images, prefix hits ended inside one, steps overlapped."""
    for mode in ("chain", "tree"):
        assert v1[f"small-{mode}", "mixed"]["spy"]["split_images"] >= 5
        assert v1[f"small-{mode}", "prefix"]["spy"]["hits_inside_image"] > 0
    assert v1["small-tree", "mixed"]["spy"]["in_flight"] == 2
    assert v1["blocks-chain", "busy"]["spy"]["in_flight"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["chain", "tree"])
def test_v1_is_lossless_under_preemption(v1: Served, mode: str) -> None:
    served = v1[f"blocks-{mode}", "busy"]
    assert_same(v1["blocks-plain", "busy"], served)
    assert served["metrics"]["vllm:num_preemptions"] > 0


@pytest.fixture(scope="module", params=params("v2", "v2-overlay", slow=["v2"]))
def other(request: pytest.FixtureRequest, tiny: TinyStore) -> Served:
    """A shorter list for the other runners."""
    mixed = {"count": 12, "max_tokens": 6}
    return serve(request.param, _setups(tiny, {"small": {"mixed": mixed, "prefix": {}}}))


@pytest.mark.parametrize("mode", ["chain", "tree"])
def test_other_runners_are_lossless(other: Served, mode: str) -> None:
    for scenario in ("mixed", "prefix"):
        assert_same(other["small-plain", scenario], other[f"small-{mode}", scenario])
    assert mean_accepted(other[f"small-{mode}", "mixed"]) > 0.3
    assert other[f"small-{mode}", "prefix"]["metrics"]["vllm:prefix_cache_hits"] > 0


def _drafts(tiny: TinyStore, runner: Runner, kind: str, drafts: dict[str, str]) -> Found:
    kwargs = {
        "kind": kind,
        "target": str(tiny.target(kind)),
        "heads": drafts,
        "count": 4,
        "situations": ["together", "prefix_hit"],
        "chunk_situations": ["chunked"],
    }
    items = run_in_subprocess("tests.engine.kinds_jobs:serve", kwargs, runner.env(), timeout=1500)
    return {item["head"]: item for item in items}


def _assert_sound(item: dict[str, Any]) -> None:
    """Drafts as in PyTorch, the same whatever else goes on, and each image encoded once."""
    assert item["model"] == "EagleDraftVlmForCausalLM"
    assert item["cold_same"]
    assert item["torch_gap"] < TOLERANCE
    assert item["blind_gap"] > 100 * TOLERANCE
    encoded, images = item["encoded"]
    assert encoded == images > 0
    for situation, served in item["situations"].items():
        assert served["same"], situation
        for request, row in served["requests"].items():
            assert row["accepted"] == row["cold_accepted"], (situation, request)
            assert row["gap"] < TOLERANCE, (situation, request)
            assert row["shared"] == row["cold_keys"] > 0, (situation, request)


@pytest.mark.parametrize("runner", params("v1", "v2", slow=["v2"]))
def test_drafts_are_those_of_pytorch(tiny: TinyStore, runner: Runner) -> None:
    own = tiny.draft_vlm(KIND)[1]
    item = _drafts(tiny, runner, KIND, {"own": own})["own"]
    _assert_sound(item)
    assert sum(sum(rounds) for rounds in item["accepted"].values()) > 0
    assert item["situations"]["chunks-chunked"]["spy"]["split_images"] > 0
    hits = item["situations"]["roomy-prefix_hit"]["requests"].values()
    assert sum(row["cached"] > 0 for row in hits) >= 1


@pytest.mark.slow
def test_other_shapes_and_targets(tiny: TinyStore) -> None:
    """Wider than the target with a tied table and no biases; one layer on a deepstack target."""
    wide: dict[str, Any] = {"hidden": 192, "heads": 4, "kv_heads": 2, "qkv_bias": False}
    tied = tiny.draft_vlm(KIND, tied=True, **wide)[1]
    _assert_sound(_drafts(tiny, RUNNERS["v1"], KIND, {"tied": tied})["tied"])
    deep = tiny.draft_vlm("qwen3_vl", layers=1)[1]
    _assert_sound(_drafts(tiny, RUNNERS["v1"], "qwen3_vl", {"deep": deep})["deep"])
