"""Two tensor-parallel workers (processes, gloo): lossless, and drafts like those of one worker."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.setups import accepted, mean_accepted, outputs
from tests.support.child import run_in_subprocess
from tests.support.runners import RUNNERS
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
COUNT = 16
TWO_WORKERS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.fixture(scope="module")
def served(tiny: TinyStore) -> dict[str, dict[str, Any]]:
    """Two workers without and with the head, one worker with it."""
    target, head = tiny.pair(KIND)
    base: dict[str, Any] = {
        "model": target,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
    }
    runs = {
        "plain": base | {"extra": TWO_WORKERS},
        "spec": base | {"extra": TWO_WORKERS, "draft": head},
        "one worker": base | {"draft": head},
    }
    tree = {"num_draft_tokens": 29, "tree": {"policy": "eagle2"}}
    runs |= {f"{name}, tree": runs[name] | tree for name in ("spec", "one worker")}
    kwargs = {"kind": KIND, "runs": runs, "count": COUNT}
    items = run_in_subprocess("tests.engine.parallel_jobs:serve", kwargs, RUNNERS["v1"].env(), 1500)
    return {item["name"]: item for item in items}


DRAFTS = pytest.mark.parametrize("drafts", ["", ", tree"], ids=["chain", "tree"])


@DRAFTS
def test_lossless(served: dict[str, dict[str, Any]], drafts: str) -> None:
    assert len(served["plain"]["results"]) == COUNT
    spec = served["spec" + drafts]
    assert outputs(served["plain"]) == outputs(spec)
    assert spec["metrics"]["vllm:spec_decode_num_drafts"] > 0


@DRAFTS
def test_drafts_equal_those_of_one_worker(served: dict[str, dict[str, Any]], drafts: str) -> None:
    assert accepted(served["spec" + drafts]) == accepted(served["one worker" + drafts])
    assert mean_accepted(served["spec" + drafts]) > 0.2
