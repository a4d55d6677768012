"""Two tensor-parallel workers (processes, gloo): lossless, and drafts like those of one worker.

With ViSpec's adaptor, with a gated compressor, which every worker has for itself, and with a draft
VLM, whose embedding and lm_head are shared out. A head with fewer key/value heads than there are
workers has them on several.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.setups import accepted, mean_accepted, outputs
from tests.support.child import run_in_subprocess
from tests.support.runners import RUNNERS
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
COUNT = 10
GATED = {"compressor": "select(prune:2,pool:4,text_only)", "num_q": 1, "dialect": "canonical"}
TWO_WORKERS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.fixture(scope="module")
def served(tiny: TinyStore) -> dict[str, dict[str, Any]]:
    """Two workers without and with the head, one worker with it."""
    target, head = tiny.pair(KIND)
    _, gated = tiny.pair(KIND, **GATED)
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
        "spec gated": base | {"extra": TWO_WORKERS, "draft": gated},
        "one worker gated": base | {"draft": gated},
    }
    tree = {"num_draft_tokens": 29, "tree": {"policy": "eagle2"}}
    runs |= {f"{name}, tree": runs[name] | tree for name in ("spec", "one worker")}
    others = {
        "vlm": tiny.draft_vlm(KIND, kv_heads=2)[1],
        "one kv head": tiny.pair(KIND, kv_heads=1)[1],
        "vlm, one kv head": tiny.draft_vlm(KIND, kv_heads=1)[1],
    }
    for kind, draft in others.items():
        given = {"draft": draft}
        runs |= {f"{name}, {kind}": runs[name] | given for name in ("spec", "one worker")}
    kwargs = {"kind": KIND, "runs": runs, "count": COUNT}
    items = run_in_subprocess("tests.engine.parallel_jobs:serve", kwargs, RUNNERS["v1"].env(), 1500)
    return {item["name"]: item for item in items}


KINDS = pytest.mark.parametrize(
    "kind", ["", " gated", ", tree", ", vlm", ", one kv head", ", vlm, one kv head"]
)


@KINDS
def test_lossless(served: dict[str, dict[str, Any]], kind: str) -> None:
    assert len(served["plain"]["results"]) == COUNT
    spec = served["spec" + kind]
    assert outputs(served["plain"]) == outputs(spec)
    assert spec["metrics"]["vllm:spec_decode_num_drafts"] > 0


@KINDS
def test_drafts_equal_those_of_one_worker(served: dict[str, dict[str, Any]], kind: str) -> None:
    assert accepted(served["spec" + kind]) == accepted(served["one worker" + kind])
    assert mean_accepted(served["spec" + kind]) > 0.2
