"""A request's drafts do not depend on what else goes on: they equal those of a cold single run.

Compared are the accepted tokens of every step and the logits behind every draft (relative to the
request's largest logit). Two exceptions:

* A preempted request that resumes recomputes its cache and emits one token without drafts, so its
  steps begin elsewhere from there on. Where steps begin at the same token, logits agree.
* When an image's rows are gone and its tokens are a prefix hit, there is nothing to draft from: the
  miss is counted, output stays right and logits are far off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.support.comparison import Compared, compare, serve_cold
from tests.support.engine import Engine
from tests.support.runners import marks
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import Request, image_text, mixed_requests, words

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

TOLERANCE = 1e-4
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


def requests(kind: str) -> list[Request]:
    """Return requests of all kinds, some with images, whole or cut, before a cached block."""
    image = image_text(kind, 1)
    return [
        *mixed_requests(kind, 8, 22, seed=3),
        Request("deep-0", f"Look: {image} {words(40, 80)}", (2,), 24),
        Request("deep-1", f"Look: {image} and {image} {words(41, 80)}", (4, 5), 24),
        Request("cut-0", f"{words(42, 22)} {image} {words(43, 60)}", (7,), 24),
    ]


@pytest.mark.parametrize(("runner", "compiler", "situation"), SITUATIONS)
def test_drafts_equal_a_cold_single_run(
    engine: Callable[..., Engine],
    tiny: TinyStore,
    runner: str,
    compiler: str | None,
    situation: str,
) -> None:
    name, _, what = situation.partition("-")
    options = {"draft": tiny.head(), "compiler": compiler}
    cold = engine(runner, **ROOMY, **options).once(serve_cold, requests(KIND))
    found = compare(cold, engine(runner, **ENGINES[name], **options), what, requests(KIND))
    assert len(found.requests) >= 8
    assert all(row.same_ids for row in found.requests.values())
    if situation == "blocks-together":
        assert_preempted(found)
    elif situation == "roomy-true_miss":
        assert_true_miss(found)
    else:
        assert_equal(found)
    if situation == "roomy-prefix_hit":
        assert sum(row.cached > 0 for row in found.requests.values()) >= 3
    elif situation == "chunks-together":
        assert found.spy.split_images > 0
    elif situation == "roomy-table_only":
        # The encoder cache was cleared, the rows survived.
        assert found.requests["deep-0"].cached > 0
        assert found.table["hits"] > 0


def assert_equal(found: Compared) -> None:
    """Same acceptance and logits; the table was not asked in vain."""
    assert found.table["misses"] == 0
    for request, row in found.requests.items():
        assert row.accepted == row.cold_accepted, request
        assert row.shared == row.cold_steps > 0, request
        assert row.gap < TOLERANCE, request


def assert_preempted(found: Compared) -> None:
    """Exception 1: steps move, the logits of steps at the same token do not."""
    assert found.spy.preempted
    for request, row in found.requests.items():
        assert row.gap < TOLERANCE, request
        if request in found.spy.preempted:
            assert row.shared >= 0.5 * row.cold_steps, request
        else:
            assert row.accepted == row.cold_accepted, request


def assert_true_miss(found: Compared) -> None:
    """Exception 2; it also shows that the comparison of logits sees a wrong row."""
    assert found.table["misses"] > 0
    for request in ("deep-0", "deep-1", "cut-0"):
        assert found.requests[request].cached > 0
        assert found.requests[request].gap > 100 * TOLERANCE
