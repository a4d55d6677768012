"""Requests that the engine tests serve, as plain data, and a driver for in-process engines."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.support.engine import Completion, completions, greedy
from tests.support.tiny_configs import FAMILIES
from tests.support.tiny_models import random_image
from tests.support.tiny_tokenizers import CORPUS

if TYPE_CHECKING:
    from vllm import LLM

WORDS = CORPUS.split()
SIZES = ((56, 56), (84, 84), (112, 112), (56, 112), (112, 84))
# Request kinds in the order in which :func:`mixed_requests` deals them out.
KINDS: Mapping[str, tuple[Any, ...]] = {
    "text": ("",),
    "one": ("A user shows", 1, "."),
    "many": ("Compare", 1, "with", 1, "and with", 1, "."),
    "touching": ("Read both", 2, "."),
    "start": (1, "What is it?"),
    "long": ("",),
    "end": ("Name the colour of", -1),
    "same": ("The picture", 0, "shows"),
}


@dataclass(frozen=True)
class Request:
    """One request: ``text`` with one placeholder per image, image seeds and sampling settings.

    ``ids`` stand in for ``text`` where the exact number of prompt tokens matters.
    """

    name: str
    text: str
    images: tuple[int, ...] = ()
    max_tokens: int = 16
    settings: Mapping[str, Any] = field(default_factory=dict)
    ids: tuple[int, ...] = ()

    def prompt(self) -> dict[str, Any]:
        """Return the prompt for vLLM; an image's size follows from its seed."""
        prompt: dict[str, Any] = {"prompt": self.text}
        if self.ids:
            prompt = {"prompt_token_ids": list(self.ids)}
        if self.images:
            pictures = [random_image(seed, SIZES[seed % len(SIZES)]) for seed in self.images]
            prompt["multi_modal_data"] = {"image": pictures}
        return prompt

    def params(self) -> Any:
        """Return greedy sampling parameters, changed by ``settings``; one output at the end."""
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.FINAL_ONLY
        return greedy(self.max_tokens, output_kind=kind, **self.settings)


def words(seed: int, count: int) -> str:
    """Return ``count`` words of the tokenizer's corpus, about a token each."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def image_text(kind: str, count: int, bare: bool = False) -> str:
    """Return the placeholders of ``count`` images; ``bare`` leaves out Qwen's start and end."""
    family = FAMILIES[kind]
    return (family.image_token if bare else family.image_prompt) * count


def mixed_requests(kind: str, count: int, max_tokens: int = 14, seed: int = 0) -> list[Request]:
    """Return ``count`` requests of all :data:`KINDS` for family ``kind``, in turn."""
    names = list(KINDS)
    return [
        _mixed(kind, names[i % len(names)], seed * 1000 + i, max_tokens + i % 5)
        for i in range(count)
    ]


def _mixed(kind: str, name: str, seed: int, max_tokens: int) -> Request:
    """Build one request; in the parts, a number stands for images.

    0 is one image that all such requests share, -1 ends the prompt with the bare image tokens, and
    2 are two images without anything between them.
    """
    pieces: list[str] = []
    images: list[int] = []
    for part in KINDS[name]:
        if isinstance(part, str):
            pieces.append(part)
            continue
        images += [7] if part == 0 else [10 * seed + len(images) + j for j in range(abs(part))]
        bare = part in (-1, 2) or (name == "start")
        pieces.append(image_text(kind, abs(part) or 1, bare))
    text = " ".join(pieces)
    if name != "end":
        text += " " + words(seed, 90 if name == "long" else 8 + seed % 11)
    return Request(f"{name}-{seed}", text.lstrip(), tuple(images), max_tokens)


Results = dict[str, list[Completion]]


def drive(
    llm: LLM,
    requests: Sequence[Request],
    abort_after: Mapping[str, int] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Results:
    """Serve ``requests`` together under their own names; aborted ones have no result.

    ``abort_after`` aborts a request after that many engine steps.
    """
    engine, results = llm.llm_engine, Results()
    for request in requests:
        engine.add_request(request.name, request.prompt(), request.params())
    step = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                results[output.request_id] = completions(output)
        step += 1
        due = [name for name, after in (abort_after or {}).items() if after == step]
        if due:
            engine.abort_request(due)
        if on_step is not None:
            on_step(step)
    return {name: found for name, found in results.items() if name not in (abort_after or {})}


def drive_one_by_one(llm: LLM, requests: Sequence[Request]) -> Results:
    """Serve each request alone with cold caches."""
    results = Results()
    for request in requests:
        forget(llm)
        results |= drive(llm, [request])
    return results


def forget(llm: LLM) -> None:
    """Drop every cached prefix and encoder output (and with the latter the image table)."""
    assert llm.llm_engine.reset_prefix_cache()
    llm.llm_engine.reset_encoder_cache()


def as_json(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Return results as plain data for :mod:`tests.support.child`."""
    return {name: [item.to_json() for item in found] for name, found in results.items()}
