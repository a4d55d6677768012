"""Drafts in many situations against those of a cold single run of the same requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.support.engine import Engine
from tests.support.spies import (
    DraftLogits,
    Logits,
    SchedulerSpy,
    engine_core,
    largest_difference,
    model_runner,
    record,
    table_stats,
    watch,
)
from tests.support.workloads import (
    Request,
    Results,
    drive,
    drive_one_by_one,
    forget,
    image_text,
    mixed_requests,
    words,
)

if TYPE_CHECKING:
    from vllm import LLM

TOLERANCE = 1e-4
"""Of draft logits, relative to a request's largest."""
Cold = tuple[Results, dict[str, Logits]]
"""Results and draft logits by request."""


@dataclass(frozen=True)
class Row:
    """One request, compared with its cold run.

    Attributes:
        gap: Largest difference of draft logits at shared steps, over the largest logit.
        shared: Draft tokens of both runs at the same place.
        cold_steps: All of the cold run.
    """

    same_ids: bool
    accepted: list[int]
    cold_accepted: list[int]
    cached: int
    gap: float
    shared: int
    cold_steps: int


@dataclass(frozen=True)
class Compared:
    """All requests, and what happened meanwhile."""

    requests: Mapping[str, Row]
    spy: SchedulerSpy
    table: Mapping[str, int]
    results: Results


def compare(cold: Cold, engine: Engine, situation: str, requests: list[Request]) -> Compared:
    """Serve ``requests`` in one of :data:`SITUATIONS` and compare with their cold run."""
    results, logits, spy, table = engine.run(_in_situation, situation, requests)
    rows = {}
    for name, (completion,) in results.items():
        expected, (alone,) = cold[1][name], cold[0][name]
        gap, shared = largest_difference(expected, logits[name])
        rows[name] = Row(
            same_ids=completion.token_ids == alone.token_ids,
            accepted=completion.per_step_accepted,
            cold_accepted=alone.per_step_accepted,
            cached=completion.num_cached_tokens,
            gap=gap / max(float(row.abs().max()) for row in expected.values()),
            shared=shared,
            cold_steps=len(expected),
        )
    return Compared(rows, spy, table, results)


def assert_same_drafts(found: Compared) -> None:
    """The drafts are those of the cold run.

    A preempted request that resumes recomputes its cache and emits one token without drafts, so
    steps begin elsewhere from there on. Where they begin at the same token, logits agree.
    """
    assert found.table["misses"] == 0
    for name, row in found.requests.items():
        assert row.same_ids, name
        assert row.gap < TOLERANCE, name
        assert row.shared > 0, name
        if not found.spy.preempted:
            assert row.accepted == row.cold_accepted, name
            assert row.shared == row.cold_steps, name


def deep_requests(kind: str) -> list[Request]:
    """Return requests with images, whole or cut, before a cached block."""
    image = image_text(kind, 1)
    return [
        Request("deep-0", f"Look: {image} {words(40, 80)}", (2,), 24),
        Request("deep-1", f"Look: {image} and {image} {words(41, 80)}", (4, 5), 24),
        Request("cut-0", f"{words(42, 22)} {image} {words(43, 60)}", (7,), 24),
    ]


# What follows runs in the child.


def serve_cold(llm: LLM, requests: Sequence[Request]) -> Cold:
    """Serve each request alone with cold caches; what :func:`compare` compares with."""
    with record(llm) as recorded:
        results = drive_one_by_one(llm, requests)
    return results, _by_request(recorded, requests)


def _by_request(recorded: DraftLogits, requests: Sequence[Request]) -> dict[str, Logits]:
    return {one.name: recorded.of_request(one.name) for one in requests}


def _in_situation(llm: LLM, situation: str, requests: list[Request]) -> tuple[Any, ...]:
    before = table_stats(llm)
    with record(llm) as recorded, watch(llm) as spy:
        forget(llm)
        results = SITUATIONS[situation](llm, requests, recorded)
    grown = {key: value - before[key] for key, value in table_stats(llm).items()}
    return results, _by_request(recorded, requests), spy, grown


def together(llm: LLM, requests: list[Request], recorded: DraftLogits) -> Results:
    """All requests in one batch, caches cold."""
    return drive(llm, requests)


def chunked(llm: LLM, requests: list[Request], recorded: DraftLogits) -> Results:
    """Each request alone and cold; the engine's small budget splits prompts and images."""
    return drive_one_by_one(llm, requests)


def prefix_hit(
    llm: LLM,
    requests: list[Request],
    recorded: DraftLogits,
    before_each: Callable[[LLM], None] = lambda llm: None,
) -> Results:
    """Each request alone after it has been served once."""
    for request in requests:
        drive(llm, [request])
    recorded.rows.clear()
    results: Results = {}
    for request in requests:
        before_each(llm)
        results |= drive(llm, [request])
    return results


def table_only(llm: LLM, requests: list[Request], recorded: DraftLogits) -> Results:
    """A prefix hit after the encoder cache was emptied; the table of image rows survives."""
    return prefix_hit(llm, requests, recorded, _empty_encoder_cache)


def true_miss(llm: LLM, requests: list[Request], recorded: DraftLogits) -> Results:
    """A prefix hit for which neither the encoder's output nor the image's rows are left."""
    return prefix_hit(llm, requests, recorded, lambda llm: llm.llm_engine.reset_encoder_cache())


def aborted_neighbours(llm: LLM, requests: list[Request], recorded: DraftLogits) -> Results:
    """All requests in one batch with others that are aborted in every phase."""
    others = mixed_requests("qwen2_5_vl", 8, 30, seed=5)
    pairs = [one for both in zip(others, requests, strict=False) for one in both]
    due = {request.name: 1 + 2 * index for index, request in enumerate(others)}
    return drive(llm, pairs + requests[len(others) :], due)


def _empty_encoder_cache(llm: LLM) -> None:
    """Forget the encoder's outputs behind the back of our table, as its evictions do."""
    cache = model_runner(llm).encoder_cache
    getattr(cache, "encoder_outputs", cache).clear()
    engine_core(llm).scheduler.encoder_cache_manager.reset()


SITUATIONS: Mapping[str, Callable[..., Results]] = {
    function.__name__: function
    for function in (together, chunked, prefix_hit, table_only, true_miss, aborted_neighbours)
}
