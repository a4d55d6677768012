"""Times the parts of every decoding round inside an engine that lives in this process (V1)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

PARTS = ("first_pass", "step", "draft_model_first", "draft_model_step", "draft_logits")
WHOLE = ("propose", "target_model", "target_logits", "host", "round")


@dataclass(frozen=True)
class Span:
    """Something that ran from ``begin`` to ``end``, in seconds."""

    name: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin


class RoundProbe:
    """Records when the target, the proposer and the draft run.

    Args:
        model_runner: vLLM's V1 model runner.
        clock: A name in ``CLOCKS``.
    """

    def __init__(self, model_runner: Any, clock: str = "wall") -> None:
        self._now = CLOCKS[clock]
        self._spans: list[Span] = []
        drafter = model_runner.drafter
        self._wrap(model_runner, "execute_model", "execute")
        self._wrap(drafter, "propose", "propose")
        self._wrap(drafter.model, "compute_logits", "draft_logits")
        self._wrap(model_runner.model, "compute_logits", "target_logits")
        self._hook(drafter.model, "draft_model")
        self._hook(model_runner.model, "target_model")

    def take(self, num_draft_tokens: int) -> list[dict[str, float]]:
        """Return the rounds since the last call, seconds by part; incomplete ones are left out."""
        spans, self._spans = self._spans, []
        starts = [i for i, span in enumerate(spans) if span.name == "execute"]
        rounds = []
        for start, stop in pairwise(starts):
            # The first round is the prefill, the last has no end; both are no decoding rounds.
            parts = split_round(spans[start:stop], num_draft_tokens)
            if start != starts[0] and parts is not None:
                parts["round"] = spans[stop].begin - spans[start].begin
                busy = ("propose", "target_model", "target_logits")
                parts["host"] = parts["round"] - sum(parts[name] for name in busy)
                rounds.append(parts)
        return rounds

    def _wrap(self, owner: Any, attribute: str, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            index = self._begin(name)
            try:
                return original(*args, **kwargs)
            finally:
                self._end(index)

        setattr(owner, attribute, timed)

    def _hook(self, module: torch.nn.Module, name: str) -> None:
        open_spans: list[int] = []
        module.register_forward_pre_hook(lambda *_: open_spans.append(self._begin(name)))
        module.register_forward_hook(lambda *_: self._end(open_spans.pop()))

    def _begin(self, name: str) -> int:
        self._spans.append(Span(name, self._now(), 0.0))
        return len(self._spans) - 1

    def _end(self, index: int) -> None:
        span = self._spans[index]
        self._spans[index] = Span(span.name, span.begin, self._now())


def wall_time() -> float:
    """Return the time once the device is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ``cpu`` counts what this thread used, which other programs on a busy machine hardly change.
CLOCKS: Mapping[str, Callable[[], float]] = {"wall": wall_time, "cpu": time.thread_time}


def split_round(spans: list[Span], num_draft_tokens: int) -> dict[str, float] | None:
    """Split one round, None if it is incomplete; a pass or step ends when its logits are there."""
    named: dict[str, list[Span]] = {}
    for span in spans:
        named.setdefault(span.name, []).append(span)
    logits, models = named.get("draft_logits", []), named.get("draft_model", [])
    whole = ("propose", "target_model", "target_logits")
    is_complete = all(len(named.get(name, ())) == 1 for name in whole)
    if not is_complete or not len(logits) == len(models) == num_draft_tokens:
        return None
    parts = {name: named[name][0].seconds for name in whole}
    parts["first_pass"] = logits[0].end - named["propose"][0].begin
    parts["draft_model_first"] = models[0].seconds
    parts["draft_logits"] = _mean([span.seconds for span in logits])
    if num_draft_tokens > 1:
        parts["step"] = (logits[-1].end - logits[0].end) / (num_draft_tokens - 1)
        parts["draft_model_step"] = _mean([span.seconds for span in models[1:]])
    return parts


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
