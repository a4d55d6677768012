"""Child-process jobs that compare drafts in many situations with those of a cold single run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.engine.spies import engine_core, watch
from tests.engine.workloads import (
    Request,
    Results,
    drive,
    drive_one_by_one,
    forget,
    image_text,
    mixed_requests,
    words,
)
from tests.support import draft_logits, engine

if TYPE_CHECKING:
    import torch
    from vllm import LLM

Logits = dict[tuple[int, int], "torch.Tensor"]
ROOMY: Mapping[str, Any] = {"max_num_batched_tokens": 256, "max_num_seqs": 8, "max_model_len": 256}


@dataclass
class Bench:
    """One engine with its recorder, and the requests that are served."""

    llm: LLM
    kind: str
    requests: list[Request]
    recorded: draft_logits.DraftLogits = field(init=False)

    def __post_init__(self) -> None:
        self.recorded = draft_logits.record(self.llm)

    def logits(self) -> dict[str, Logits]:
        """Return what was recorded since the last call, by request and (position, step)."""
        rows = {item.name: dict(self.recorded.of_request(item.name)) for item in self.requests}
        self.recorded.rows.clear()
        return rows

    def one_by_one(self) -> Results:
        """Serve each request alone, caches as they are."""
        results: Results = {}
        for request in self.requests:
            results |= drive(self.llm, [request])
        return results


def together(bench: Bench) -> Results:
    """All requests in one batch, caches cold."""
    forget(bench.llm)
    return drive(bench.llm, bench.requests)


def chunked(bench: Bench) -> Results:
    """Each request alone and cold; the engine's small budget splits prompts and images."""
    return drive_one_by_one(bench.llm, bench.requests)


def prefix_hit(bench: Bench) -> Results:
    """Each request alone after it has been served once."""
    forget(bench.llm)
    bench.one_by_one()
    bench.recorded.rows.clear()
    return bench.one_by_one()


def table_only(bench: Bench) -> Results:
    """A prefix hit after the encoder cache was emptied; the table of image rows survives."""
    forget(bench.llm)
    bench.one_by_one()
    bench.recorded.rows.clear()
    results: Results = {}
    for request in bench.requests:
        empty_encoder_cache(bench.llm)
        results |= drive(bench.llm, [request])
    return results


def true_miss(bench: Bench) -> Results:
    """A prefix hit for which neither the encoder's output nor the image's rows are left."""
    forget(bench.llm)
    bench.one_by_one()
    bench.recorded.rows.clear()
    results: Results = {}
    for request in bench.requests:
        bench.llm.llm_engine.reset_encoder_cache()
        results |= drive(bench.llm, [request])
    return results


def aborted_neighbours(bench: Bench) -> Results:
    """All requests in one batch with others that are aborted in every phase."""
    forget(bench.llm)
    others = mixed_requests(bench.kind, 8, 30, seed=5)
    pairs = [one for both in zip(others, bench.requests, strict=False) for one in both]
    rest = bench.requests[len(others) :]
    due = {request.name: 1 + 2 * index for index, request in enumerate(others)}
    return drive(bench.llm, pairs + rest, due)


Situation = Callable[[Bench], Results]
SITUATIONS: Mapping[str, Situation] = {
    function.__name__: function
    for function in (together, chunked, prefix_hit, table_only, true_miss, aborted_neighbours)
}


def empty_encoder_cache(llm: LLM) -> None:
    """Forget the encoder's outputs behind the back of our table, as its evictions do."""
    runner = draft_logits.model_runner(llm)
    cache = runner.encoder_cache
    getattr(cache, "encoder_outputs", cache).clear()
    engine_core(llm).scheduler.encoder_cache_manager.reset()


def compare(
    kind: str, options: dict[str, Any], setups: list[dict[str, Any]], count: int = 10
) -> Iterator[dict[str, Any]]:
    """Serve requests cold and alone, then in every situation, and yield what differs.

    Gaps of draft logits are relative to the request's largest logit (tiny targets have large ones).

    A setup has a ``name``, changed ``options`` and ``situations`` by name.
    """
    requests = mixed_requests(kind, count, 22, seed=3) + deep_requests(kind)
    with engine.engine(engine.EngineOptions(**(options | dict(ROOMY)))) as llm:
        bench = Bench(llm, kind, requests)
        cold_results = drive_one_by_one(llm, requests)
        cold_logits = bench.logits()
    for setup in setups:
        merged = options | dict(ROOMY) | setup["options"]
        with engine.engine(engine.EngineOptions(**merged)) as llm:
            bench = Bench(llm, kind, requests)
            for name in setup["situations"]:
                spy, before = watch(llm), table_stats(llm)
                results = SITUATIONS[name](bench)
                stats = {key: value - before[key] for key, value in table_stats(llm).items()}
                yield {
                    "situation": f"{setup['name']}-{name}",
                    "requests": compare_results(cold_results, cold_logits, results, bench.logits()),
                    "spy": spy.to_json(),
                    "table": stats,
                }


def deep_requests(kind: str) -> list[Request]:
    """Return requests whose images lie, whole or cut, in front of a block that is cached."""
    image = image_text(kind, 1)
    return [
        Request("deep-0", f"Look: {image} {words(40, 80)}", (2,), 24),
        Request("deep-1", f"Look: {image} and {image} {words(41, 80)}", (4, 5), 24),
        Request("cut-0", f"{words(42, 22)} {image} {words(43, 60)}", (7,), 24),
    ]


def table_stats(llm: LLM) -> dict[str, int]:
    """Return the counters of the table of image rows."""
    return dict(vars(draft_logits.drafter(llm).draft_rows.table.stats))


def compare_results(
    cold: Results,
    cold_logits: Mapping[str, Logits],
    found: Results,
    found_logits: Mapping[str, Logits],
) -> dict[str, dict[str, Any]]:
    rows = {}
    for name, (completion,) in found.items():
        gap, shared = draft_logits.largest_difference(cold_logits[name], found_logits[name])
        scale = max(float(row.abs().max()) for row in cold_logits[name].values())
        (alone,) = cold[name]
        rows[name] = {
            "same_ids": completion.token_ids == alone.token_ids,
            "accepted": completion.accepted_draft,
            "cold_accepted": alone.accepted_draft,
            "cached": completion.num_cached_tokens,
            "gap": gap / scale,
            "shared": shared,
            "cold_keys": len(cold_logits[name]),
        }
    return rows
