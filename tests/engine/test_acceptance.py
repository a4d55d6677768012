"""A request's drafts do not depend on what else goes on: they equal those of a cold single run.

Compared are the accepted tokens of every round and the logits behind every draft (relative to the
request's largest logit). Two exceptions:

* A preempted request that resumes recomputes its cache and emits one token without a draft round,
  so its rounds begin elsewhere from there on. Where rounds begin at the same token, logits agree.
* When an image's rows are gone and its tokens are a prefix hit, there is nothing to draft from: the
  miss is counted, output stays right and logits are far off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.setups import params
from tests.support.child import run_in_subprocess
from tests.support.runners import RUNNERS, Runner
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
TOLERANCE = 1e-4
Situations = dict[str, dict[str, Any]]

CHUNKS: Mapping[str, Any] = {"max_num_batched_tokens": 24, "max_num_seqs": 3}
ROOMY: Mapping[str, Any] = {
    "name": "roomy",
    "options": {},
    "situations": ["together", "prefix_hit", "table_only", "aborted_neighbours", "true_miss"],
}
SETUPS: Mapping[str, list[Mapping[str, Any]]] = {
    "v1": [
        ROOMY,
        {"name": "chunks", "options": CHUNKS, "situations": ["chunked", "together"]},
        {"name": "blocks", "options": {"num_blocks": 9}, "situations": ["together"]},
        {"name": "async", "options": {"async_scheduling": True}, "situations": ["together"]},
    ],
    "v2": [
        {"name": "roomy", "options": {}, "situations": ["prefix_hit", "table_only", "true_miss"]},
        {"name": "chunks", "options": CHUNKS, "situations": ["together"]},
        {"name": "blocks", "options": {"num_blocks": 9}, "situations": ["together"]},
        {"name": "async", "options": {"async_scheduling": True}, "situations": ["together"]},
    ],
}
EQUAL = [
    "roomy-together",
    "roomy-prefix_hit",
    "roomy-table_only",
    "roomy-aborted_neighbours",
    "chunks-chunked",
    "chunks-together",
    "async-together",
]


COMPILED = replace(RUNNERS["v1"], name="v1-compiled")


@pytest.fixture(
    scope="module",
    params=[
        *params("v1", "v2", "v1-overlay", slow=["v2"]),
        pytest.param(COMPILED, id=COMPILED.name, marks=pytest.mark.slow),
    ],
)
def found(request: pytest.FixtureRequest, tiny: TinyStore) -> Situations:
    """Every situation of one runner, compared with cold single runs."""
    runner: Runner = request.param
    target, head = tiny.pair(KIND)
    kwargs = {
        "kind": KIND,
        "options": {
            "model": target,
            "draft": head,
            "compiler": "eager" if runner is COMPILED else None,
        },
        "setups": SETUPS[runner.name.split("-")[0]],
        "count": 8,
    }
    items = run_in_subprocess(
        "tests.engine.acceptance_jobs:compare", kwargs, runner.env(), timeout=1500
    )
    return {item["situation"]: item for item in items}


def test_drafts_equal_a_cold_single_run(found: Situations) -> None:
    names = [name for name in EQUAL if name in found]
    assert {"roomy-prefix_hit", "roomy-table_only", "chunks-together"} <= set(names)
    for name in names:
        requests = found[name]["requests"]
        assert len(requests) >= 8
        for request, row in requests.items():
            assert row["same_ids"], (name, request)
            assert row["accepted"] == row["cold_accepted"], (name, request)
            assert row["shared"] == row["cold_keys"] > 0, (name, request)
            assert row["gap"] < TOLERANCE, (name, request)


def test_situations_arose(found: Situations) -> None:
    """Hits, splits and aborts really happened; the table was not asked in vain."""
    hits = found["roomy-prefix_hit"]
    assert sum(row["cached"] > 0 for row in hits["requests"].values()) >= 3
    assert found["chunks-together"]["spy"]["split_images"] > 0
    assert all(found[name]["table"]["misses"] == 0 for name in EQUAL if name in found)


def test_encoder_cache_cleared_but_rows_survive(found: Situations) -> None:
    served = found["roomy-table_only"]
    assert served["requests"]["deep-0"]["cached"] > 0
    assert served["table"]["hits"] > 0


def test_preempted_requests(found: Situations) -> None:
    """Exception 1: rounds move, the logits of rounds at the same token do not."""
    served = found["blocks-together"]
    preempted = set(served["spy"]["preempted"])
    assert preempted
    for request, row in served["requests"].items():
        assert row["same_ids"], request
        assert row["gap"] < TOLERANCE, request
        if request in preempted:
            assert row["shared"] >= 0.5 * row["cold_keys"], request
        else:
            assert row["accepted"] == row["cold_accepted"], request


def test_true_miss(found: Situations) -> None:
    """Exception 2; it also shows that the comparison of logits sees a wrong row."""
    served = found["roomy-true_miss"]
    assert served["table"]["misses"] > 0
    assert all(row["same_ids"] for row in served["requests"].values())
    for request in ("deep-0", "deep-1", "cut-0"):
        assert served["requests"][request]["cached"] > 0
        assert served["requests"][request]["gap"] > 100 * TOLERANCE
