"""K follows the batch size: outputs stay, and a stretch with K = 0 leaves no trace in the drafts.

One request decodes while others come and go, so that K falls to 0 and rises again around it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

from tests.support.engine import StartEngine
from tests.support.runners import runners
from tests.support.spies import (
    DraftLogits,
    Logits,
    drafter,
    engine_core,
    largest_difference,
    record,
    table_stats,
)
from tests.support.tiny_store import GATED, KIND, TinyStore
from tests.support.workloads import (
    Request,
    Served,
    assert_lossless,
    drive,
    forget,
    mixed_requests,
    serve_requests,
)

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

K = 5
SCHEDULE = [[1, 2, K], [3, 4, 1], [5, 7, 0], [8, 16, 2]]
TOLERANCE = 1e-4
OPTIONS: Mapping[str, Any] = {"max_num_batched_tokens": 128}
# ViSpec's adaptor elsewhere; a gate decides also in steps in which nothing is drafted.
HEADS: Mapping[str, Mapping[str, Any]] = {"v1": GATED}
# Engine step -> requests that arrive after it, beside the one that is there from the start.
ARRIVALS = {4: 2, 9: 2, 14: 6}
SURVIVOR = replace(mixed_requests(KIND, 2, seed=3)[1], max_tokens=70)
VISITORS = mixed_requests(KIND, sum(ARRIVALS.values()), 14, seed=4)


@dataclass
class Wave:
    """What one wave of requests met.

    Attributes:
        steps: (batch size, K) of every step.
        before: Draft tokens of the lasting request up to the last step with K = 0.
        logits: All of its draft logits.
    """

    served: Served
    steps: list[tuple[int, int]] = field(default_factory=list)
    before: set[tuple[int, int]] = field(default_factory=set)
    logits: Logits = field(default_factory=dict)
    misses: int = 0


@pytest.mark.parametrize("mode", ["sync", "async", "skipped"])
@pytest.mark.parametrize("runner", runners("v1", "v2", "v1-overlay", slow=["v1", "v2"]))
def test_schedule(engine: StartEngine, tiny: TinyStore, runner: str, mode: str) -> None:
    head = {"draft": tiny.head(**HEADS.get(runner, {}))}
    plain = engine(runner, **OPTIONS).once(serve_requests, [SURVIVOR, *VISITORS])
    # The same request alone, at a K that never changed.
    cold: Logits = {}
    for tokens in (1, K):
        cold |= engine(runner, **OPTIONS, **head, num_draft_tokens=tokens).once(_alone)
    changing = {"config": {"num_speculative_tokens_per_batch_size": SCHEDULE}}
    asynchronous = {"async_scheduling": mode == "async"}
    found: Wave = engine(runner, **OPTIONS, **head, **changing, **asynchronous).run(
        _wave, mode == "skipped"
    )
    assert_lossless(plain, found.served)
    early = {key: row for key, row in found.logits.items() if key in found.before}
    late = {key: row for key, row in found.logits.items() if key not in found.before}
    scale = max(float(row.abs().max()) for row in cold.values())
    if mode == "skipped":
        # The control: without the draft's first pass at K = 0, outputs stay and drafts go wrong.
        assert largest_difference(cold, late)[0] / scale > 100 * TOLERANCE
        return
    wanted = {batch: k for first, last, k in SCHEDULE for batch in range(first, last + 1)}
    assert all(k == wanted[batch] for batch, k in found.steps)
    assert {k for _, k in found.steps} == {K, 1, 0, 2}
    assert found.steps[0][1] == found.steps[-1][1] == K
    for part in (early, late):
        gap, shared = largest_difference(cold, part)
        assert shared >= 5
        assert shared >= 0.5 * len(part)
        assert gap / scale < TOLERANCE
    assert found.misses == 0


# What follows runs in the child.


def _alone(llm: LLM) -> Logits:
    with record(llm) as recorded:
        serve_requests(llm, [SURVIVOR])
    return recorded.of_request(SURVIVOR.name)


def _wave(llm: LLM, skip: bool) -> Wave:
    """Serve one request while others make the batch grow and shrink."""
    forget(llm)
    found, waiting = Wave(Served({})), list(VISITORS)
    misses = table_stats(llm)["misses"]
    with _without_drafts_of_no_tokens(llm) if skip else nullcontext(), record(llm) as recorded:
        results = _drive_wave(llm, found, waiting, recorded)
    found.logits = recorded.of_request(SURVIVOR.name)
    found.misses = table_stats(llm)["misses"] - misses
    found.served = Served(results)
    return found


def _drive_wave(llm: LLM, found: Wave, waiting: list[Request], recorded: DraftLogits) -> Any:
    def on_step(step: int) -> None:
        if found.steps and found.steps[-1][1] == 0:
            found.before = set(recorded.of_request(SURVIVOR.name))
        for _ in range(ARRIVALS.get(step, 0)):
            one = waiting.pop()
            llm.llm_engine.add_request(one.name, one.prompt(), one.params())

    scheduler = engine_core(llm).scheduler
    schedule = scheduler.schedule

    def spied(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        if output.num_scheduled_tokens:
            step = len(output.num_scheduled_tokens), output.num_spec_tokens_to_schedule
            found.steps.append(step)
        return output

    with patch.object(scheduler, "schedule", spied):
        return drive(llm, [SURVIVOR], on_step=on_step)


@contextmanager
def _without_drafts_of_no_tokens(llm: LLM) -> Iterator[None]:
    """Do what must not be done: leave the draft's cache behind while nothing is drafted."""
    proposer = drafter(llm)
    propose = proposer.propose

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs["num_speculative_tokens"]:
            return propose(*args, **kwargs)
        if hasattr(proposer, "draft_tokens"):
            return proposer.draft_tokens[: args[0].num_reqs].fill_(-1)
        return kwargs["next_token_ids"].new_empty(len(kwargs["next_token_ids"]), 0)

    with patch.object(proposer, "propose", wrapped):
        yield
