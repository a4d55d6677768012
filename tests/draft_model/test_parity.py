"""A published model drafts in the engine what it answers in transformers, step by step.

Every step's accepted tokens are those of the draft's own greedy continuation of prompt and answer
so far, computed by transformers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

import pytest
import torch

from tests.support.engine import Completion, Engine
from tests.support.runners import marks
from tests.support.tiny_store import TinyStore
from tests.support.workloads import Request, mixed_requests

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

COUNT = 4
SMALL: Mapping[str, Any] = {"max_num_batched_tokens": 48}
BLOCKS: Mapping[str, Any] = {"max_num_batched_tokens": 96, "num_blocks": 10}
ROWS = [
    pytest.param(*row, id="-".join(row[:3]), marks=marks(row[0], slow))
    for row, slow in (
        (("v1", "qwen2_5_vl", "small", 16, 14), False),
        (("v1", "qwen2_5_vl", "blocks", 16, 40), False),
        (("v1", "qwen3_vl", "small", 8, 14), False),
        (("v1", "llava_next", "small", 8, 14), False),
        (("v2", "qwen2_5_vl", "small", 8, 8), True),
        (("v2", "qwen3_vl", "small", 8, 8), True),
        (("v2", "llava_next", "small", 8, 8), True),
        (("v1-overlay", "qwen2_5_vl", "small", 8, 14), False),
        (("v2-overlay", "qwen2_5_vl", "small", 8, 8), False),
    )
]


@lru_cache
def _model(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


class Continuation:
    """What a published model says next, after a request's prompt and a part of an answer."""

    def __init__(self, folder: str, request: Request) -> None:
        self._model, processor = _model(folder)
        prompt = request.prompt()
        images = prompt.get("multi_modal_data", {}).get("image")
        self._inputs = dict(processor(text=prompt["prompt"], images=images, return_tensors="pt"))

    def __call__(self, answered: list[int], count: int) -> list[int]:
        """Return the model's next ``count`` tokens, greedily."""
        return [token for token, _ in islice(self.tokens(answered), count)]

    @torch.inference_mode()
    def tokens(self, answered: list[int]) -> Iterator[tuple[int, float]]:
        """Yield the model's next tokens, greedily, and their probabilities."""
        inputs, said = dict(self._inputs), list(answered)
        while True:
            ids = torch.tensor([said], dtype=torch.long)
            extra = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if "mm_token_type_ids" in inputs:
                extra["mm_token_type_ids"] = torch.zeros_like(ids)
            joined = {k: torch.cat([self._inputs[k], v], dim=1) for k, v in extra.items()}
            logits = self._model(**inputs | joined, use_cache=False).logits
            said.append(int(logits[0, -1].argmax()))
            yield said[-1], float(logits[0, -1].softmax(-1).max())


def explains(found: Completion, says: Callable[[list[int], int], list[int]], lone: int) -> bool:
    """Whether the accepted tokens of each step are those of ``says``.

    Args:
        lone: At most so many tokens came without drafts: a resumed request's first one.
    """
    ids, steps = found.token_ids, found.per_step_accepted

    @lru_cache(None)
    def fits(done: int, step: int, lone: int) -> bool:
        if step == len(steps):
            return len(ids) - done <= lone
        if done >= len(ids):
            return False
        drafts, truth = says(ids[:done], found.drafted[step]), ids[done:]
        same = next(
            (i for i, (a, b) in enumerate(zip(drafts, truth, strict=False)) if a != b), None
        )
        # Behind the answer's end nobody knows what the target would have said.
        agree = (
            steps[step] == same if same is not None else steps[step] >= min(len(drafts), len(truth))
        )
        if agree and fits(done + steps[step] + 1, step + 1, lone):
            return True
        if agree and done + steps[step] + 1 >= len(ids) and step + 1 == len(steps):
            return True
        return lone > 0 and fits(done + 1, step, lone - 1)

    return fits(1, 0, lone)


@pytest.mark.parametrize(("runner", "kind", "base", "count", "max_tokens"), ROWS)
def test_drafts_are_those_of_transformers(
    engine: Callable[..., Engine],
    tiny: TinyStore,
    runner: str,
    kind: str,
    base: str,
    count: int,
    max_tokens: int,
) -> None:
    sibling = tiny.sibling(kind)
    options = {"small": SMALL, "blocks": BLOCKS}[base]
    drafting = engine(runner, kind=kind, draft=sibling, num_draft_tokens=COUNT, **options)
    found = drafting.serve("mixed", count=count, max_tokens=max_tokens)
    requests = mixed_requests(kind, count, max_tokens)
    assert {request.name for request in requests} == set(found.results)
    for request in requests:
        if request.name.startswith("touching") and kind.startswith("qwen"):
            continue  # transformers takes images without anything between them for one
        (one,) = found.results[request.name]
        lone = found.spy.preempted.count(request.name)
        assert explains(one, Continuation(sibling, request), lone), request.name
    assert found.acceptance() > 0.1
    if base == "blocks":
        assert found.spy.preempted
    else:
        assert found.spy.split_images > 0
