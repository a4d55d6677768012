"""Single paths on V2 end where V1's do, request by request and step by step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

from tests.support.drafts import tree
from tests.support.engine import StartEngine
from tests.support.runners import runners
from tests.support.spies import model_runner
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import Served, mixed_requests, serve_requests

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

REQUESTS = mixed_requests(KIND, 8, 12, seed=3)
LEVELS = 4
# Whose draft, the rule, and lengths that occur; the tiny head is sure of nearly everything.
PATHS: Mapping[str, tuple[bool, str, float, set[int]]] = {
    "head": (False, "spec_llava", 0.9999, {1, LEVELS}),
    "published model": (True, "spec_llava", 0.6, {0, 1, 2, LEVELS}),
    "published model, entropy": (True, "entropy", 0.5, {1, 2, LEVELS}),
}
Steps = dict[str, list[tuple[int, int]]]
"""Tokens before the end of the path, and accepted ones, of every step of each request."""


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("runner", runners("v2", "v2-overlay", slow=["v2"]))
def test_paths_end_where_v1_ends_them(
    engine: StartEngine, tiny: TinyStore, runner: str, path: str
) -> None:
    is_sibling, policy, threshold, occurring = PATHS[path]
    draft = tiny.sibling() if is_sibling else tiny.head(seed=2)
    options: dict[str, Any] = {"draft": draft, "max_num_batched_tokens": 96}
    options |= tree(LEVELS, policy=policy, top_k=1, threshold=threshold)
    v1 = engine(runner.replace("v2", "v1"), **options).once(serve_requests, REQUESTS)
    v2, steps = engine(runner, **options, async_scheduling=True).run(_serve_and_follow, REQUESTS)
    assert v2.outputs() == v1.outputs()
    expected = {
        name: list(zip(one.drafted, one.per_step_accepted, strict=True))
        for name, (one,) in v1.results.items()
    }
    # V1 schedules no drafts where there are none; on V2 such a step accepts none.
    assert {name: [one for one in found if one[0]] for name, found in steps.items()} == expected
    assert {length for found in steps.values() for length, _ in found} >= occurring
    assert all(accepted <= length for found in steps.values() for length, accepted in found)


# What follows runs in the child.


def _serve_and_follow(llm: LLM, requests: Any) -> tuple[Served, Steps]:
    """Serve ``requests`` and note where paths end when they are verified."""
    sampler, lengths = model_runner(llm).rejection_sampler, defaultdict[str, list[int]](list)
    call = type(sampler).__call__

    def followed(self: Any, logits: Any, batch: Any, *args: Any) -> Any:
        found = self._length[batch.idx_mapping].tolist()
        rows = zip(batch.req_ids, batch.num_draft_tokens_per_req.tolist(), found, strict=True)
        for request_id, scheduled, length in rows:
            if scheduled:
                lengths[request_id.rsplit("-", 1)[0]].append(min(length, scheduled))
        return call(self, logits, batch, *args)

    with patch.object(type(sampler), "__call__", followed):
        served = serve_requests(llm, requests)
    steps = {
        name: list(zip(lengths[name], one.per_step_accepted, strict=False))
        for name, (one,) in served.results.items()
    }
    return served, steps
