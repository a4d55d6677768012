"""A published model drafts in the engine what it answers in transformers, step by step.

Every step's accepted tokens are those of the draft's own greedy continuation of prompt and answer
so far, computed by transformers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import groupby, islice, pairwise
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
BASES = {
    "small": SMALL,
    "blocks": BLOCKS,
    "async": {**SMALL, "async_scheduling": True},
    # K as by default: none while prompts are read, then what it is worth.
    "adaptive": SMALL,
}
ROWS = [
    pytest.param(*row, id="-".join(row[:4]), marks=marks(row[0], slow))
    for row, slow in (
        (("v1", "qwen2_5_vl", "small", "all", 16, 14), False),
        (("v1", "qwen2_5_vl", "blocks", "all", 16, 40), False),
        (("v1", "qwen2_5_vl", "adaptive", "prune:4", 8, 30), False),
        (("v1", "qwen2_5_vl", "small", "none", 8, 14), False),
        (("v1", "qwen2_5_vl", "small", "text", 8, 14), False),
        (("v1", "qwen2_5_vl", "small", "prune:4", 8, 14), False),
        (("v1", "qwen2_5_vl", "blocks", "prune:3", 16, 40), True),
        (("v1", "qwen3_vl", "small", "all", 8, 14), False),
        (("v1", "qwen3_vl", "small", "pool:4", 8, 14), False),
        (("v1", "llava_next", "small", "all", 8, 14), False),
        (("v1", "llava_next", "small", "none", 8, 14), True),
        (("v1", "llava_next", "small", "pool:3", 8, 14), True),
        (("v2", "qwen2_5_vl", "small", "all", 8, 8), True),
        (("v2", "qwen2_5_vl", "small", "none", 8, 8), True),
        (("v2", "qwen2_5_vl", "small", "text", 8, 8), True),
        (("v2", "qwen2_5_vl", "small", "prune:4", 8, 8), True),
        (("v2", "qwen2_5_vl", "blocks", "prune:3", 8, 40), True),
        (("v2", "qwen2_5_vl", "async", "prune:4", 8, 8), True),
        (("v2", "qwen2_5_vl", "async", "none", 8, 8), True),
        (("v2", "qwen3_vl", "small", "all", 8, 8), True),
        (("v2", "qwen3_vl", "small", "pool:4", 8, 8), True),
        (("v2", "llava_next", "small", "all", 8, 8), True),
        (("v1-overlay", "qwen2_5_vl", "small", "all", 8, 14), False),
        (("v2-overlay", "qwen2_5_vl", "small", "all", 8, 8), False),
    )
]


@lru_cache
def _model(folder: str) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()


class Continuation:
    """What a published model says next, after a request's prompt and a part of an answer.

    Of images it sees what ``images`` says, like the setting of this name. With "none" it reads the
    prompt without their tokens, as a text model does, whose prompts ``processor`` writes.
    """

    def __init__(
        self, folder: str, request: Request, images: str = "all", processor: str = ""
    ) -> None:
        from transformers import AutoProcessor

        self._model, self._images = _model(folder), images
        found, prompt = AutoProcessor.from_pretrained(processor or folder), request.prompt()
        pictures = prompt.get("multi_modal_data", {}).get("image")
        self._inputs = dict(found(text=prompt["prompt"], images=pictures, return_tensors="pt"))
        self._image_id = found.tokenizer.convert_tokens_to_ids(found.image_token)
        if images == "none":
            ids = self._inputs["input_ids"]
            self._inputs = {"input_ids": ids[ids != self._image_id].unsqueeze(0)}

    def __call__(self, answered: list[int], count: int) -> list[int]:
        """Return the model's next ``count`` tokens, greedily."""
        return [token for token, _ in islice(self.tokens(answered), count)]

    def tokens(self, answered: list[int]) -> Iterator[tuple[int, float]]:
        """Yield the model's next tokens, greedily, and their probabilities."""
        said = list(answered)
        while True:
            logits_V = self.next_logits(said)
            said.append(int(logits_V.argmax()))
            yield said[-1], float(logits_V.softmax(-1).max())

    @torch.inference_mode()
    def next_logits(self, said: list[int]) -> torch.Tensor:
        """Return the model's logits ``[V]`` behind the prompt and what was said."""
        ids = torch.tensor([said], dtype=torch.long)
        extra = {"input_ids": ids}
        if "attention_mask" in self._inputs:
            extra["attention_mask"] = torch.ones_like(ids)
        if "mm_token_type_ids" in self._inputs:
            extra["mm_token_type_ids"] = torch.zeros_like(ids)
        joined = {k: torch.cat([self._inputs[k], v], dim=1) for k, v in extra.items()}
        return self._logits(self._inputs | joined)[0, -1]

    def _logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if ":" not in self._images:
            return self._model(**inputs, use_cache=False).logits
        is_image_S = inputs["input_ids"][0] == self._image_id

        def see_fewer(_: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, given | _fewer_rows(given, is_image_S, self._images)

        handle = self._model.model.language_model.register_forward_pre_hook(
            see_fewer, with_kwargs=True
        )
        with handle:
            return self._model(**inputs, use_cache=False).logits


def _fewer_rows(given: dict[str, Any], is_image_S: torch.Tensor, images: str) -> dict[str, Any]:
    """Return what a language model reads, of S rows only those that are seen.

    An image of N rows has ``max(1, N // amount)`` stretches, of each the middle row is seen.
    """
    name, amount = images.split(":")
    source_S: list[range] = []
    for is_image, group in groupby(range(len(is_image_S)), lambda row: bool(is_image_S[row])):
        rows = list(group)
        count = max(1, len(rows) // int(amount)) if is_image else len(rows)
        borders = [rows[0] + i * len(rows) // count for i in range(count + 1)]
        source_S += [range(*two) for two in pairwise(borders)]
    seen = torch.tensor([(one.start + one.stop - 1) // 2 for one in source_S])

    def take(rows_SD: torch.Tensor) -> torch.Tensor:
        parts = source_S if name == "pool" else [range(row, row + 1) for row in seen.tolist()]
        return torch.stack([rows_SD[one.start : one.stop].mean(0) for one in parts])

    found = {
        name: given[name][..., seen]
        for name in ("attention_mask", "position_ids")
        if given.get(name) is not None
    }
    found.setdefault("position_ids", seen.unsqueeze(0))
    found["inputs_embeds"] = take(given["inputs_embeds"][0]).unsqueeze(0)
    if given.get("deepstack_visual_embeds") is not None:
        all_S = torch.zeros_like(given["inputs_embeds"][0])
        levels = [all_S.index_put((is_image_S,), one) for one in given["deepstack_visual_embeds"]]
        found["visual_pos_masks"] = is_image_S[seen].unsqueeze(0)
        found["deepstack_visual_embeds"] = [take(level)[is_image_S[seen]] for level in levels]
    return found


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


@pytest.mark.parametrize(("runner", "kind", "base", "images", "count", "max_tokens"), ROWS)
def test_drafts_are_those_of_transformers(
    engine: Callable[..., Engine],
    tiny: TinyStore,
    runner: str,
    kind: str,
    base: str,
    images: str,
    count: int,
    max_tokens: int,
) -> None:
    draft = tiny.text_model(kind) if images == "text" else tiny.sibling(kind)
    config: dict[str, Any] = {} if images in ("all", "text") else {"images": images}
    config["adaptive"] = base == "adaptive"
    seen = "none" if images == "text" else images
    drafting = engine(
        runner, kind=kind, draft=draft, num_draft_tokens=COUNT, config=config, **BASES[base]
    )
    found = drafting.serve("mixed", count=count, max_tokens=max_tokens)
    requests = mixed_requests(kind, count, max_tokens)
    assert {request.name for request in requests} == set(found.results)
    for request in requests:
        is_touching = request.name.startswith("touching")
        if is_touching and seen != "none" and (kind.startswith("qwen") or seen != "all"):
            continue  # transformers takes images without anything between them for one
        (one,) = found.results[request.name]
        # Steps without drafts are none of those listed.
        is_adaptive = base == "adaptive"
        lone = max_tokens if is_adaptive else found.spy.preempted.count(request.name)
        says = Continuation(draft, request, seen, str(tiny.target(kind)))
        assert explains(one, says, lone), request.name
    assert found.acceptance() > 0.1
    assert (found.spy.in_flight == 2) == (base == "async")
    if base == "blocks":
        assert found.spy.preempted
    else:
        assert found.spy.split_images > 0
