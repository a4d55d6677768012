"""A request's drafts do not depend on what else goes on: they equal those of a cold single run.

Compared are the accepted tokens of every step and the logits behind every draft (relative to the
request's largest logit). Two exceptions:

* A preempted request resumes with steps that begin elsewhere: see `assert_same_drafts`.
* When an image's rows are gone and its tokens are a prefix hit, there is nothing to draft from: the
  miss is counted, output stays right and logits are far off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.support.comparison import (
    TOLERANCE,
    assert_same_drafts,
    compare,
    deep_requests,
    serve_cold,
)
from tests.support.engine import StartEngine
from tests.support.runners import marks
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import mixed_requests

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

ROOMY = {"max_num_batched_tokens": 256, "max_num_seqs": 8}
ENGINES: Mapping[str, Mapping[str, Any]] = {
    "roomy": ROOMY,
    "chunks": {"max_num_batched_tokens": 24, "max_num_seqs": 3},
    "blocks": ROOMY | {"num_blocks": 9},
    "async": ROOMY | {"async_scheduling": True},
}
V1 = (
    "roomy-together roomy-prefix_hit roomy-table_only roomy-aborted_neighbours roomy-true_miss "
    "chunks-chunked chunks-together blocks-together async-together"
)
V2 = (
    "roomy-prefix_hit roomy-table_only roomy-true_miss "
    "chunks-together blocks-together async-together"
)
SITUATIONS = [
    pytest.param(runner, compiler, situation, id=f"{name}-{situation}", marks=marks(runner, slow))
    for name, runner, compiler, situations, slow in (
        ("v1", "v1", None, V1, False),
        ("v2", "v2", None, V2, True),
        ("v1-overlay", "v1-overlay", None, V1, False),
        ("v1-compiled", "v1", "eager", V1, True),
    )
    for situation in situations.split()
]


REQUESTS = [*mixed_requests(KIND, 8, 22, seed=3), *deep_requests(KIND)]


@pytest.mark.parametrize(("runner", "compiler", "situation"), SITUATIONS)
def test_drafts_equal_a_cold_single_run(
    engine: StartEngine, tiny: TinyStore, runner: str, compiler: str | None, situation: str
) -> None:
    where, _, what = situation.partition("-")
    options = {"draft": tiny.head(), "compiler": compiler}
    cold = engine(runner, **ROOMY, **options).once(serve_cold, REQUESTS)
    found = compare(cold, engine(runner, **ENGINES[where], **options), what, REQUESTS)
    assert len(found.requests) >= 8
    if what == "true_miss":
        # It also shows that the comparison of logits sees a wrong row.
        assert found.table["misses"] > 0
        assert all(row.same_ids for row in found.requests.values())
        for request in deep_requests(KIND):
            assert found.requests[request.name].cached > 0
            assert found.requests[request.name].gap > 100 * TOLERANCE
        return
    assert_same_drafts(found)
    if where == "blocks":
        assert found.spy.preempted
        for name, row in found.requests.items():
            if name in found.spy.preempted:
                assert row.shared >= 0.5 * row.cold_steps, name
            else:
                assert row.accepted == row.cold_accepted, name
    elif situation == "chunks-together":
        assert found.spy.split_images > 0
    elif what == "prefix_hit":
        assert sum(row.cached > 0 for row in found.requests.values()) >= 3
    elif what == "table_only":
        # The encoder cache was cleared, the rows survived.
        assert found.requests["deep-0"].cached > 0
        assert found.table["hits"] > 0
