"""Adaptive verification on V2: drafts are cut on the device, ours stay what they are without it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.setups import outputs, params
from tests.support.child import run_in_subprocess
from tests.support.runners import Runner
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
TOLERANCE = 1e-4
Modes = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=params("v2", slow=["v2"]))
def served(request: pytest.FixtureRequest, tiny: TinyStore) -> Modes:
    """The same requests plain, with adaptive verification, and without our part in it."""
    runner: Runner = request.param
    target, head = tiny.pair(KIND)
    options = {
        "model": target,
        "draft": head,
        "num_draft_tokens": 3,
        "max_model_len": 256,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 8,
    }
    kwargs = {"kind": KIND, "options": options, "count": 6, "modes": ["adaptive", "unmoved"]}
    items = run_in_subprocess("tests.engine.adaptive_jobs:serve", kwargs, runner.env(), 1500)
    return {item["mode"]: item for item in items}


def test_batches_were_cut_unevenly(served: Modes) -> None:
    found = served["adaptive"]
    assert found["moved"] >= 5
    assert found["cut"] >= found["moved"]
    assert 0 < found["verified"] < found["drafted"]


def test_outputs_are_plain_vllms(served: Modes) -> None:
    plain = outputs(served["plain"])
    for mode in ("adaptive", "unmoved"):
        assert outputs(served[mode]) == plain, mode


def test_drafts_are_those_of_a_request_alone(served: Modes) -> None:
    for name, row in served["adaptive"]["requests"].items():
        assert row["shared"] >= 5, name
        assert row["gap"] < TOLERANCE, name
    assert served["adaptive"]["table"]["misses"] == 0


def test_the_comparison_sees_rows_of_a_neighbour(served: Modes) -> None:
    """The control: with the host's borders, some requests draft with another one's image."""
    rows = served["unmoved"]["requests"].values()
    assert max(row["gap"] for row in rows) > 100 * TOLERANCE
