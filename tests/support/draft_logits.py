"""Record the draft's logits of an in-process engine, to compare them between runs.

Acceptance alone is a weak witness: a wrong draft row often leaves every argmax as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm import LLM

Key = tuple[str, int, int]


def model_runner(llm: LLM) -> Any:
    """Return the model runner of an in-process engine (V1 or V2)."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def drafter(llm: LLM) -> Any:
    """Return V1's proposer or V2's speculator."""
    runner = model_runner(llm)
    return getattr(runner, "drafter", None) or runner.speculator


@dataclass
class DraftLogits:
    """Logits [vocabulary] by (request id, sequence position of the first draft row, draft step).

    Request ids are those of ``RequestOutput``. A round that is repeated overwrites its entries.
    """

    rows: dict[Key, torch.Tensor] = field(default_factory=dict)
    _requests: list[str] = field(default_factory=list)
    _positions: Callable[[], list[int]] | None = None
    _current: list[int] = field(default_factory=list)
    _step: int = 0

    def of_request(self, request_id: str) -> dict[tuple[int, int], torch.Tensor]:
        """Return one request's logits by (position, step)."""
        return {
            (pos, step): row for (owner, pos, step), row in self.rows.items() if owner == request_id
        }

    def begin(self, request_ids: list[str], positions: Callable[[], list[int]]) -> None:
        """Start a draft round of ``request_ids``; ``positions`` is asked at its first logits."""
        self._requests = [name.rsplit("-", 1)[0] for name in request_ids]
        self._positions, self._step = positions, 0

    def add(self, logits: torch.Tensor) -> None:
        """Store the logits [requests, vocabulary] of the round's next step."""
        if self._positions is None:
            return
        if self._step == 0:
            self._current = self._positions()
        for index, (name, position) in enumerate(zip(self._requests, self._current, strict=True)):
            self.rows[name, position, self._step] = logits[index].detach().clone()
        self._step += 1


def record(llm: LLM) -> DraftLogits:
    """Record every draft logit of ``llm`` from now on (in-process, eager engines only)."""
    recorded = DraftLogits()
    proposer = drafter(llm)
    compute = proposer.model.compute_logits

    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        logits = compute(*args, **kwargs)
        recorded.add(logits)
        return logits

    proposer.model.compute_logits = compute_logits
    follow = _follow_v1 if hasattr(proposer, "set_inputs_first_pass") else _follow_v2
    follow(llm, proposer, recorded)
    return recorded


def _follow_v1(llm: LLM, proposer: Any, recorded: DraftLogits) -> None:
    runner, first_pass = model_runner(llm), proposer.set_inputs_first_pass

    def set_inputs_first_pass(*args: Any, **kwargs: Any) -> Any:
        result = first_pass(*args, **kwargs)
        rows = proposer.positions[result[1]].tolist()
        recorded.begin(list(runner.input_batch.req_ids), lambda: rows)
        return result

    proposer.set_inputs_first_pass = set_inputs_first_pass


def _follow_v2(llm: LLM, proposer: Any, recorded: DraftLogits) -> None:
    propose = proposer.propose

    def wrapped(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        count = input_batch.num_reqs

        def positions() -> list[int]:
            last = proposer.last_token_indices[:count]
            rows: list[int] = proposer.input_buffers.positions[last].tolist()
            return rows

        recorded.begin(list(input_batch.req_ids[:count]), positions)
        return propose(input_batch, *args, **kwargs)

    proposer.propose = wrapped


def largest_difference(
    one: Mapping[tuple[int, int], torch.Tensor], other: Mapping[tuple[int, int], torch.Tensor]
) -> tuple[float, int]:
    """Return the largest absolute difference over the shared keys, and how many there are."""
    shared = sorted(set(one) & set(other))
    gaps = [float((one[key] - other[key]).abs().max()) for key in shared]
    return max(gaps, default=0.0), len(shared)
