"""K follows the batch size: outputs stay, and a stretch with K = 0 leaves no trace in the drafts.

One request decodes while others come and go, so that K falls to 0 and rises again around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.engine.setups import outputs, params
from tests.support.child import run_in_subprocess
from tests.support.runners import Runner
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
K = 5
SCHEDULE = [[1, 2, K], [3, 4, 1], [5, 7, 0], [8, 16, 2]]
TOLERANCE = 1e-4
MODES: Mapping[str, dict[str, Any]] = {
    "sync": {},
    "async": {"async_scheduling": True},
    "skipped": {"skip": True},
}
TOKENS = 70
# ViSpec's adaptor elsewhere; a gate decides also in steps in which nothing is drafted.
HEADS: Mapping[str, dict[str, Any]] = {
    "v1": {
        "compressor": "select(prune:2,pool:4,text_only)",
        "num_q": 1,
        "dialect": "canonical",
    }
}
Waves = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=params("v1", "v2", "v1-overlay", slow=["v1", "v2"]))
def waves(request: pytest.FixtureRequest, tiny: TinyStore) -> Waves:
    """The wave without speculation and in every mode of one runner."""
    runner: Runner = request.param
    target, head = tiny.pair(KIND, **HEADS.get(runner.name, {}))
    kwargs = {
        "kind": KIND,
        "options": {"model": target, "draft": head, "num_draft_tokens": K, "max_model_len": 256},
        "schedule": SCHEDULE,
        "modes": MODES,
        "tokens": TOKENS,
    }
    items = run_in_subprocess("tests.engine.schedule_jobs:serve", kwargs, runner.env(), 1500)
    return {item["mode"]: item for item in items}


def wanted(batch: int) -> int:
    """Return K by the schedule."""
    return next(k for first, last, k in SCHEDULE if first <= batch <= last)


def modes(waves: Waves) -> list[str]:
    """Return those in which the draft is kept up."""
    return [mode for mode in waves if mode not in ("plain", "skipped")]


def test_k_follows_the_batch(waves: Waves) -> None:
    for mode in modes(waves):
        pairs = waves[mode]["pairs"]
        assert all(k == wanted(batch) for batch, k in pairs), mode
        order = [k for index, (_, k) in enumerate(pairs) if not index or pairs[index - 1][1] != k]
        assert set(order) == {K, 1, 0, 2}, mode
        assert order[0] == order[-1] == K, mode


def test_outputs_are_plain_vllms(waves: Waves) -> None:
    plain = outputs(waves["plain"])
    for mode in waves:
        assert outputs(waves[mode]) == plain, mode


def test_drafts_behind_a_stretch_of_zero(waves: Waves) -> None:
    """Their logits are those of the same request alone, at a K that never changed."""
    for mode in modes(waves):
        for part in ("early", "late"):
            found = waves[mode][part]
            assert found["shared"] >= 5, (mode, part, found)
            assert found["shared"] >= 0.5 * found["rounds"], (mode, part, found)
            assert found["gap"] < TOLERANCE, (mode, part, found)
        assert waves[mode]["table"]["misses"] == 0, mode


def test_the_comparison_sees_a_draft_left_behind(waves: Waves) -> None:
    """The control: without the draft's first pass at K = 0, outputs stay and drafts go wrong."""
    assert waves["skipped"]["late"]["gap"] > 100 * TOLERANCE
