"""Child-process jobs: K changes with the batch, while requests come and go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tests.engine.acceptance_jobs import Logits, table_stats
from tests.engine.spies import engine_core
from tests.engine.workloads import Request, Results, as_json, drive, forget, mixed_requests
from tests.support import draft_logits, engine

if TYPE_CHECKING:
    from vllm import LLM

SETTINGS: Mapping[str, Any] = {"max_num_batched_tokens": 128, "max_num_seqs": 16}
ARRIVALS = {4: 2, 9: 2, 14: 6}
"""Engine step -> requests that arrive after it, beside the one that is there from the start."""


@dataclass
class Wave:
    """What one wave of requests met.

    Attributes:
        pairs: (batch size, K) of every step.
        before: draft rounds of the first request up to the last step with K = 0.
    """

    pairs: list[tuple[int, int]] = field(default_factory=list)
    before: set[tuple[int, int]] = field(default_factory=set)
    results: Results = field(default_factory=dict)


def survivor(kind: str, tokens: int) -> Request:
    """Return the request that is there from first to last; it shows an image."""
    return replace(mixed_requests(kind, 2, seed=3)[1], max_tokens=tokens)


def visitors(kind: str) -> list[Request]:
    """Return the requests that come and go meanwhile, with and without images."""
    return mixed_requests(kind, sum(ARRIVALS.values()), 14, seed=4)


def wave(llm: LLM, kind: str, tokens: int, recorded: draft_logits.DraftLogits) -> Wave:
    """Serve one request while others make the batch grow and shrink."""
    forget(llm)
    first, found = survivor(kind, tokens), Wave()
    waiting = visitors(kind)
    unspy = _spy(llm, found)

    def on_step(step: int) -> None:
        if found.pairs and found.pairs[-1][1] == 0:
            found.before = set(recorded.of_request(first.name))
        for _ in range(ARRIVALS.get(step, 0)):
            one = waiting.pop()
            llm.llm_engine.add_request(one.name, one.prompt(), one.params())

    found.results = drive(llm, [first], on_step=on_step)
    unspy()
    return found


def _spy(llm: LLM, found: Wave) -> Any:
    scheduler = engine_core(llm).scheduler
    schedule = scheduler.schedule

    def spied(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        if output.num_scheduled_tokens:
            pair = len(output.num_scheduled_tokens), output.num_spec_tokens_to_schedule
            found.pairs.append(pair)
        return output

    scheduler.schedule = spied
    return lambda: setattr(scheduler, "schedule", schedule)


def alone(kind: str, options: dict[str, Any], tokens: int) -> Logits:
    """Return every draft logit of the lasting request, served alone at a fixed K, cold."""
    first = survivor(kind, tokens)
    with engine.engine(engine.EngineOptions(**options)) as llm:
        recorded = draft_logits.record(llm)
        drive(llm, [first])
        return dict(recorded.of_request(first.name))


def serve(
    kind: str,
    options: dict[str, Any],
    schedule: list[list[int]],
    modes: Mapping[str, dict[str, Any]],
    tokens: int,
) -> Iterator[dict[str, Any]]:
    """Serve a wave without speculation, then with the schedule in every mode.

    A mode is changed engine options; ``skip`` among them leaves the draft out where K = 0.
    """
    base = options | dict(SETTINGS)
    with engine.engine(engine.EngineOptions(**(base | {"draft": None}))) as llm:
        requests = [survivor(kind, tokens), *visitors(kind)]
        yield {"mode": "plain", "results": as_json(drive(llm, requests))}
    cold = alone(kind, base | {"num_draft_tokens": 1}, tokens) | alone(kind, base, tokens)
    config = {"num_speculative_tokens_per_batch_size": schedule}
    for mode, changes in modes.items():
        skip = changes.pop("skip", False)
        merged = engine.EngineOptions(**(base | changes))
        speculative = merged.llm_kwargs()["speculative_config"] | config
        merged = replace(merged, extra={"speculative_config": speculative})
        with engine.engine(merged) as llm:
            if skip:
                _skip_draft_without_tokens(llm)
            recorded = draft_logits.record(llm)
            found = wave(llm, kind, tokens, recorded)
            rows = recorded.of_request(survivor(kind, tokens).name)
            yield {
                "mode": mode,
                "results": as_json(found.results),
                "pairs": found.pairs,
                "table": table_stats(llm),
                **_gaps(cold, rows, found.before),
            }


def _gaps(cold: Logits, rows: Logits, before: set[tuple[int, int]]) -> dict[str, Any]:
    """Compare with the cold run, before and behind the last step with K = 0."""
    scale = max(float(row.abs().max()) for row in cold.values())
    early = {key: row for key, row in rows.items() if key in before}
    late = {key: row for key, row in rows.items() if key not in before}
    answer: dict[str, Any] = {}
    for name, part in (("early", early), ("late", late)):
        gap, shared = draft_logits.largest_difference(cold, part)
        answer[name] = {"gap": gap / scale, "shared": shared, "rounds": len(part)}
    return answer


def _skip_draft_without_tokens(llm: LLM) -> None:
    """Do what must not be done: leave the draft's cache behind while nothing is drafted."""
    proposer = draft_logits.drafter(llm)
    propose = proposer.propose

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs["num_speculative_tokens"]:
            return propose(*args, **kwargs)
        if hasattr(proposer, "draft_tokens"):
            return proposer.draft_tokens[: args[0].num_reqs].fill_(-1)
        return kwargs["next_token_ids"].new_empty(len(kwargs["next_token_ids"]), 0)

    proposer.propose = wrapped
