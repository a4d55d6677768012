"""Every kind of head: lossless, and drafting what the PyTorch draft drafts.

ViSpec heads themselves are the business of the other files here; these are the heads of the
ablation: without the global feature, without compression, without both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.engine.setups import params
from tests.support.child import run_in_subprocess
from tests.support.runners import RUNNERS, Runner
from tests.support.tiny_heads import HeadSpec
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
TOLERANCE = 1e-4
THOROUGH: dict[str, Any] = {
    "count": 8,
    "situations": ["together", "prefix_hit"],
    "chunk_situations": ["chunked", "together"],
}
FLAGS = {
    "no_global": (True, False),
    "no_compress": (False, True),
    "neither": (False, False),
}
MODELS = {
    "no_global": "EagleViSpecForCausalLM",
    "no_compress": "EagleViSpecEmbedsForCausalLM",
    "neither": "EagleViSpecEmbedsForCausalLM",
}
Found = dict[str, dict[str, Any]]


def _heads(tiny: TinyStore, kind: str) -> dict[str, str]:
    spec = HeadSpec(kind, 3, dialect="canonical")
    return {
        name: str(tiny.head(replace(spec, compress=compress, global_feature=global_feature)))
        for name, (compress, global_feature) in FLAGS.items()
    }


def _serve(tiny: TinyStore, runner: Runner, kind: str = KIND, **settings: Any) -> Found:
    kwargs = {
        "kind": kind,
        "target": str(tiny.target(kind)),
        "heads": _heads(tiny, kind),
        **settings,
    }
    items = run_in_subprocess("tests.engine.kinds_jobs:serve", kwargs, runner.env(), timeout=1500)
    return {item["head"]: item for item in items}


@pytest.fixture(scope="module")
def quick(tiny: TinyStore) -> Found:
    """All kinds on V1, few requests."""
    return _serve(tiny, RUNNERS["v1"], count=3, situations=["together", "prefix_hit"])


@pytest.fixture(scope="module", params=params("v1", "v2", slow=list(RUNNERS)))
def thorough(request: pytest.FixtureRequest, tiny: TinyStore) -> Found:
    """All kinds on one runner, prompts and images split as well."""
    return _serve(tiny, request.param, **THOROUGH)


def _assert_sound(item: dict[str, Any], name: str) -> None:
    """Lossless everywhere; drafts as in PyTorch, and the same whatever else goes on."""
    assert item["model"] == MODELS[name]
    assert item["cold_same"]
    assert sum(sum(rounds) for rounds in item["accepted"].values()) > 0
    assert item["torch_gap"] < TOLERANCE
    assert item["blind_gap"] > 100 * TOLERANCE
    for situation, served in item["situations"].items():
        assert served["same"], situation
        assert served["table"]["misses"] == 0, situation
        for request, row in served["requests"].items():
            assert row["accepted"] == row["cold_accepted"], (situation, request)
            assert row["gap"] < TOLERANCE, (situation, request)
            assert row["shared"] == row["cold_keys"] > 0, (situation, request)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_kind(quick: Found, name: str) -> None:
    _assert_sound(quick[name], name)
    assert len(quick[name]["situations"]) == 2


@pytest.mark.parametrize("name", FLAGS)
def test_kind_in_every_situation(thorough: Found, name: str) -> None:
    _assert_sound(thorough[name], name)
    situations = thorough[name]["situations"]
    assert len(situations) == 4
    hits = situations["roomy-prefix_hit"]["requests"].values()
    assert sum(row["cached"] > 0 for row in hits) >= 2
    assert situations["chunks-chunked"]["spy"]["split_images"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_vl"])
def test_without_compression_on_other_targets(tiny: TinyStore, kind: str) -> None:
    """A vision tower with deepstack columns."""
    heads = {"no_compress": _heads(tiny, kind)["no_compress"]}
    situations = {"situations": ["together"], "chunk_situations": ["together"]}
    found = _serve(tiny, RUNNERS["v1"], kind, **{"heads": heads, "count": 4, **situations})
    _assert_sound(found["no_compress"], "no_compress")
