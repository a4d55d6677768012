"""Spies on an in-process engine: what its scheduler did, without changing it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM


def engine_core(llm: LLM) -> Any:
    """Return the engine core of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core


@dataclass
class SchedulerSpy:
    """Counters since :func:`watch`; request names are those of ``RequestOutput``."""

    split_images: int = 0
    hits_inside_image: int = 0
    largest_batch: int = 0
    in_flight: int = 0
    preempted: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the counters as plain data, as they are now."""
        return vars(self) | {"preempted": list(self.preempted)}


def watch(llm: LLM) -> SchedulerSpy:
    """Follow the scheduler of ``llm`` from now on."""
    spy, core = SchedulerSpy(), engine_core(llm)
    scheduler = core.scheduler
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def spied_schedule(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        spy.largest_batch = max(spy.largest_batch, len(output.num_scheduled_tokens))
        spy.in_flight = max(spy.in_flight, len(core.batch_queue or ()) + 1)
        for request_id in output.num_scheduled_tokens:
            request = scheduler.requests[request_id]
            end = request.num_computed_tokens
            spy.split_images += _inside_image(request, end)
        for request in output.scheduled_new_reqs:
            known = scheduler.requests[request.req_id]
            spy.hits_inside_image += _inside_image(known, request.num_computed_tokens)
        return output

    def spied_preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        spy.preempted.append(request.request_id.rsplit("-", 1)[0])
        return preempt(request, *args, **kwargs)

    scheduler.schedule, scheduler._preempt_request = spied_schedule, spied_preempt
    return spy


def watch_encoder(llm: LLM) -> list[int]:
    """Return a list that grows with every run of the vision tower, by the images in it."""
    from tests.support.draft_logits import model_runner

    runs: list[int] = []
    target = model_runner(llm).get_model()
    embed = target.embed_multimodal

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = embed(*args, **kwargs)
        runs.append(len(found))
        return found

    target.embed_multimodal = counted
    return runs


def _inside_image(request: Any, position: int) -> bool:
    """Whether a boundary before token ``position`` cuts one of the request's images in two."""
    spans = [item.mm_position for item in request.mm_features]
    return any(span.offset < position < span.offset + span.length for span in spans)
