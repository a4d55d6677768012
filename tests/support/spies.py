"""Spies on an in-process engine: what its scheduler, its encoder and its draft did.

Nothing is changed, and each spy leaves when its block ends. The draft is judged by its logits:
acceptance alone is a weak witness, since a wrong row often leaves every argmax as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    import torch
    from vllm import LLM

Logits = dict[tuple[int, int], "torch.Tensor"]
"""A request's logits [vocabulary] by sequence position of the step's first row, and draft step."""


def engine_core(llm: LLM) -> Any:
    """Return the engine core of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core


def model_runner(llm: LLM) -> Any:
    """Return the model runner of an in-process engine (V1 or V2)."""
    return engine_core(llm).model_executor.driver_worker.worker.model_runner


def drafter(llm: LLM) -> Any:
    """Return V1's proposer or V2's speculator, None without speculation."""
    runner = model_runner(llm)
    return getattr(runner, "drafter", None) or getattr(runner, "speculator", None)


def table_stats(llm: LLM) -> dict[str, int]:
    """Return the counters of the table of image rows; empty where there is none in reach."""
    executor = engine_core(llm).model_executor
    if not hasattr(executor, "driver_worker"):
        return {}
    rows = getattr(drafter(llm), "draft_rows", None)
    if rows is None or not hasattr(rows, "table"):
        return {}
    return dict(vars(rows.table.stats))


@dataclass
class SchedulerSpy:
    """What happened; request names are those of ``RequestOutput``."""

    split_images: int = 0
    hits_inside_image: int = 0
    largest_batch: int = 0
    in_flight: int = 0
    preempted: list[str] = field(default_factory=list)


@contextmanager
def watch(llm: LLM) -> Iterator[SchedulerSpy]:
    """Follow the scheduler of ``llm``."""
    spy, core = SchedulerSpy(), engine_core(llm)
    scheduler = core.scheduler
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def spied_schedule(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        spy.largest_batch = max(spy.largest_batch, len(output.num_scheduled_tokens))
        spy.in_flight = max(spy.in_flight, len(core.batch_queue or ()) + 1)
        for request_id in output.num_scheduled_tokens:
            request = scheduler.requests[request_id]
            spy.split_images += _inside_image(request, request.num_computed_tokens)
        for request in output.scheduled_new_reqs:
            known = scheduler.requests[request.req_id]
            spy.hits_inside_image += _inside_image(known, request.num_computed_tokens)
        return output

    def spied_preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        spy.preempted.append(request.request_id.rsplit("-", 1)[0])
        return preempt(request, *args, **kwargs)

    with patch.multiple(scheduler, schedule=spied_schedule, _preempt_request=spied_preempt):
        yield spy


def _inside_image(request: Any, position: int) -> bool:
    """Whether a boundary before token ``position`` cuts one of the request's images in two."""
    spans = [item.mm_position for item in request.mm_features]
    return any(span.offset < position < span.offset + span.length for span in spans)


@contextmanager
def watch_encoder(llm: LLM) -> Iterator[list[int]]:
    """Yield a list that grows with every run of the vision tower, by the images in it."""
    runs: list[int] = []
    target = model_runner(llm).get_model()
    embed = target.embed_multimodal

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = embed(*args, **kwargs)
        runs.append(len(found))
        return found

    with patch.object(target, "embed_multimodal", counted):
        yield runs


@contextmanager
def watch_drafts(llm: LLM) -> Iterator[list[list[list[int]]]]:
    """Yield a list that grows with every step by its drafts, requests by tokens.

    Where a schedule asks for fewer tokens than the engine's most, the rest of them is left over.
    """
    proposer, drafted = drafter(llm), list[list[list[int]]]()
    propose = proposer.propose

    def watched(*args: Any, **kwargs: Any) -> Any:
        drafts = propose(*args, **kwargs)
        drafted.append(drafts[:, : kwargs.get("num_speculative_tokens")].tolist())
        return drafts

    with patch.object(proposer, "propose", watched):
        yield drafted


@dataclass
class DraftLogits:
    """Logits by (request id, sequence position of the step's first row, draft step).

    Request ids are those of ``RequestOutput``. A step that is repeated overwrites its entries.
    """

    rows: dict[tuple[str, int, int], torch.Tensor] = field(default_factory=dict)
    _requests: list[str] = field(default_factory=list)
    _positions: Callable[[], list[int]] | None = None
    _current: list[int] = field(default_factory=list)
    _step: int = 0

    def of_request(self, request_id: str) -> Logits:
        """Return one request's logits by (position, step)."""
        return {
            (pos, step): row for (owner, pos, step), row in self.rows.items() if owner == request_id
        }

    def begin(self, request_ids: list[str], positions: Callable[[], list[int]]) -> None:
        """Start a step of ``request_ids``; ``positions`` is asked at its first logits."""
        self._requests = [name.rsplit("-", 1)[0] for name in request_ids]
        self._positions, self._step = positions, 0

    def add(self, logits: torch.Tensor) -> None:
        """Store the logits [requests, vocabulary] of the next draft token."""
        if self._positions is None:
            return
        if self._step == 0:
            self._current = self._positions()
        for index, (name, position) in enumerate(zip(self._requests, self._current, strict=True)):
            self.rows[name, position, self._step] = logits[index].detach().clone()
        self._step += 1


@contextmanager
def record(llm: LLM) -> Iterator[DraftLogits]:
    """Record every draft logit of ``llm`` (in-process, eager engines only)."""
    recorded, proposer, runner = DraftLogits(), drafter(llm), model_runner(llm)
    compute, propose = proposer.model.compute_logits, proposer.propose

    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        logits = compute(*args, **kwargs)
        recorded.add(logits)
        return logits

    def v1_first_pass(*args: Any, **kwargs: Any) -> Any:
        result = first_pass(*args, **kwargs)
        rows = proposer.positions[result[1]].tolist()
        recorded.begin(list(runner.input_batch.req_ids), lambda: rows)
        return result

    def v2_propose(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        count = input_batch.num_reqs

        def positions() -> list[int]:
            last = proposer.last_token_indices[:count]
            rows: list[int] = proposer.input_buffers.positions[last].tolist()
            return rows

        recorded.begin(list(input_batch.req_ids[:count]), positions)
        return propose(input_batch, *args, **kwargs)

    with ExitStack() as patches:
        patches.enter_context(patch.object(proposer.model, "compute_logits", compute_logits))
        if hasattr(proposer, "set_inputs_first_pass"):
            first_pass = proposer.set_inputs_first_pass
            patches.enter_context(patch.object(proposer, "set_inputs_first_pass", v1_first_pass))
        else:
            patches.enter_context(patch.object(proposer, "propose", v2_propose))
        yield recorded


def largest_difference(
    one: Mapping[tuple[int, int], torch.Tensor], other: Mapping[tuple[int, int], torch.Tensor]
) -> tuple[float, int]:
    """Return the largest absolute difference over the shared keys, and how many there are."""
    shared = sorted(set(one) & set(other))
    gaps = [float((one[key] - other[key]).abs().max()) for key in shared]
    return max(gaps, default=0.0), len(shared)
