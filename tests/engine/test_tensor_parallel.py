"""Two tensor-parallel workers (processes, gloo): lossless, and drafts like those of one worker.

With ViSpec's adaptor, with a gated compressor, which every worker has for itself, and with a draft
VLM, whose embedding and lm_head are shared out. A head with fewer key/value heads than there are
workers has them on several.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.drafts import Draft, tree
from tests.support.engine import Engine, StartEngine
from tests.support.tiny_store import GATED, KIND, TinyStore
from tests.support.workloads import assert_lossless, mixed_requests, serve_requests

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
TWO_WORKERS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
REQUESTS = mixed_requests(KIND, 10)
SIBLING = {"hidden_size": 128, "num_attention_heads": 4}
DRAFTS = {
    "chain": Draft(),
    "gated": Draft(GATED),
    "tree": Draft(options=tree(29, top_k=8)),
    "vlm": Draft({"num_key_value_heads": 2}, is_vlm=True),
    "sibling": Draft(SIBLING, is_sibling=True),
    "sibling, tree": Draft(SIBLING, tree(19, top_k=3), is_sibling=True),
    "sibling, whole towers": Draft(SIBLING, {"mm_encoder_tp_mode": "data"}, is_sibling=True),
    "sibling, pool": Draft(SIBLING, {"config": {"images": "pool:4"}}, is_sibling=True),
    "sibling, none": Draft(SIBLING, {"config": {"images": "none"}}, is_sibling=True),
    # Each of them has half of the draft's lm_head.
    "few tokens": Draft(few_tokens=True),
    "one kv head": Draft({"num_key_value_heads": 1}),
    "vlm, one kv head": Draft({"num_key_value_heads": 1}, is_vlm=True),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_two_workers(engine: StartEngine, tiny: TinyStore, name: str) -> None:
    def two(**options: Any) -> Engine:
        return engine("v1", process="two workers", **TWO_WORKERS, **OPTIONS, **options)

    options = DRAFTS[name].of(tiny)
    plain = two().once(serve_requests, REQUESTS)
    found = two(**options).run(serve_requests, REQUESTS)
    assert len(plain.results) == len(REQUESTS)
    assert_lossless(plain, found)
    one = engine("v1", **OPTIONS, **options).run(serve_requests, REQUESTS)
    assert found.accepted() == one.accepted()
    assert found.acceptance() > 0.2
