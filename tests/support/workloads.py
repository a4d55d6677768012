"""What the engine tests serve: requests as plain data, a driver, and scenarios made of both."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.support.engine import Completion, completions, greedy
from tests.support.more_families import ALL_FAMILIES
from tests.support.spies import SchedulerSpy, table_stats, watch
from tests.support.tiny_families import CORPUS
from tests.support.tiny_models import random_image

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
    family = ALL_FAMILIES[kind]
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


@dataclass(frozen=True)
class Served:
    """What an engine answered, and what happened meanwhile.

    Attributes:
        results: The sequences of each request.
        spy: What the scheduler did.
        table: By how much the counters of the table of image rows grew; empty for other drafts.
    """

    results: Results
    spy: SchedulerSpy = field(default_factory=SchedulerSpy)
    table: Mapping[str, int] = field(default_factory=dict)

    def outputs(self) -> dict[str, list[tuple[list[int], str, str | None]]]:
        """Return ids, text and finish reason of every sequence by request."""
        return {
            name: [(one.token_ids, one.text, one.finish_reason) for one in found]
            for name, found in self.results.items()
        }

    def accepted(self) -> dict[str, list[list[int]]]:
        """Return the accepted draft tokens of every step by request."""
        return {
            name: [one.per_step_accepted for one in found] for name, found in self.results.items()
        }

    def steps(self) -> list[tuple[int, int]]:
        """Return drafted and accepted tokens of every step."""
        return [
            step
            for found in self.results.values()
            for one in found
            for step in zip(one.drafted, one.per_step_accepted, strict=True)
        ]

    def acceptance(self) -> float:
        """Return the accepted draft tokens per step, 0 without steps."""
        accepted = [n for rows in self.accepted().values() for row in rows for n in row]
        return sum(accepted) / len(accepted) if accepted else 0.0


def assert_lossless(plain: Served, speculative: Served) -> None:
    """Same outputs, and the drafts took part."""
    expected, found = plain.outputs(), speculative.outputs()
    assert set(found) == set(expected)
    wrong = {name: (expected[name], found[name]) for name in found if expected[name] != found[name]}
    assert not wrong
    assert sum(drafted for drafted, _ in speculative.steps()) > 0


def assert_same_logprobs(plain: Served, speculative: Served, count: int) -> None:
    """Log probabilities of the chosen and the best tokens agree within 1e-4."""
    names = [name for name in plain.results if name.startswith("logprobs")]
    assert names
    for name in names:
        one, other = (served.results[name][0].logprobs for served in (plain, speculative))
        assert one is not None
        assert other is not None
        assert len(one) == len(other) == count
        for expected, found in zip(one, other, strict=True):
            assert found.keys() == expected.keys()
            assert max(abs(found[token] - expected[token]) for token in found) < 1e-4


# What follows runs in the child.


def serve(llm: LLM, scenario: str, kind: str, **kwargs: Any) -> Served:
    """Serve one of :data:`SCENARIOS` with cold caches."""
    forget(llm)
    before = table_stats(llm)
    with watch(llm) as spy:
        results = SCENARIOS[scenario](llm, kind, **kwargs)
    grown = {key: value - before.get(key, 0) for key, value in table_stats(llm).items()}
    return Served(results, spy, grown)


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


def serve_requests(llm: LLM, requests: Sequence[Request]) -> Served:
    """Serve ``requests`` together with cold caches."""
    forget(llm)
    return Served(drive(llm, requests))


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


def mixed(llm: LLM, kind: str, count: int = 64, max_tokens: int = 14) -> Results:
    """Serve requests of every kind at once."""
    return drive(llm, mixed_requests(kind, count, max_tokens))


def text(llm: LLM, kind: str, count: int = 24, max_tokens: int = 14) -> Results:
    """Serve those of the mixed requests that have no images at once."""
    requests = mixed_requests(kind, count, max_tokens)
    return drive(llm, [request for request in requests if not request.images])


def prefix(llm: LLM, kind: str) -> Results:
    """Ask three turns of different questions about the same images, then cut an image in two."""
    preamble = f"Look at {image_text(kind, 1)} and {image_text(kind, 1)}. {words(1, 40)}"
    results: Results = {}
    for turn in range(3):
        ask = [
            Request(f"turn{turn}-{i}", f"{preamble} {words(10 * turn + i, 5)}", (2, 4), 12)
            for i in range(3)
        ]
        results |= drive(llm, ask)
    text = _cut_by_block(llm, kind)
    for turn in range(2):
        results |= drive(llm, [Request(f"cut-{turn}", f"{text} {words(turn, 3)}", (2,), 12)])
    return results


def split(llm: LLM, kind: str) -> Results:
    """Serve a prompt whose image lies across the end of the first step."""
    most = llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    text = f"{_as_long_as(llm, most - 8)} {image_text(kind, 1)} {words(4, 8)}"
    return drive(llm, [Request("split", text, (2,), 12)])


def _as_long_as(llm: LLM, length: int) -> str:
    """Return words of ``length`` tokens or a few more."""
    tokenizer, count = llm.get_tokenizer(), 1
    while len(tokenizer.encode(words(3, count))) < length:
        count += 1
    return words(3, count)


def _cut_by_block(llm: LLM, kind: str) -> str:
    """Return a prompt with a 16-token image across the border of the first two blocks.

    Two full blocks match; EAGLE drops the last match, so that the hit ends after 32 tokens.
    """
    return f"{_as_long_as(llm, 22)} {image_text(kind, 1)} {words(4, 40)}"


def abort(llm: LLM, kind: str) -> Results:
    """Abort requests in the queue, in their prefill and while they decode."""
    requests = mixed_requests(kind, 20, 20, seed=2)
    due = {requests[i].name: after for i, after in ((1, 2), (4, 5), (7, 9), (10, 3), (17, 1))}
    return drive(llm, requests, due)


def features(llm: LLM, kind: str, names: Sequence[str] = ()) -> Results:
    """Sampling features, all (or those of ``names``) in one batch."""
    from vllm.sampling_params import StructuredOutputsParams

    properties = {
        "color": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "solid": {"type": "boolean"},
    }
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    grammar = StructuredOutputsParams(json=schema | {"additionalProperties": False})
    settings: Mapping[str, dict[str, Any]] = {
        # Not greedy, for which vLLM admits one sequence only, but with the same outcome.
        "n": {"n": 3, "temperature": 1.0, "top_p": 1e-6},
        "stop": {"stop": ["e", "an", "the"], "include_stop_str_in_output": True},
        "logprobs": {"logprobs": 4},
        "json": {"structured_outputs": grammar, "ignore_eos": False},
        "penalty": {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
        "words": {"bad_words": ["the"], "min_tokens": 9},
    }
    requests = [
        Request(f"{name}-{i}", f"{image_text(kind, i)} {words(i, 6)}", tuple(range(i)), 48, extra)
        for name, extra in settings.items()
        if not names or name in names
        for i in range(3)
    ]
    return drive(llm, requests)


def edge(llm: LLM, kind: str) -> Results:
    """Prompts that leave 1 to 9 tokens up to ``max_model_len``."""
    limit = llm.llm_engine.model_config.max_model_len
    tokenizer, family = llm.get_tokenizer(), ALL_FAMILIES[kind]
    image = tokenizer.encode(family.image_prompt)
    plain = tokenizer.encode(words(5, limit))
    requests = [
        Request(f"text-{room}", "", (), 20, ids=tuple(plain[: limit - room]))
        for room in range(1, 10)
    ]
    # A 16-token image takes the place of its one placeholder.
    tail = limit - 15 - len(image)
    requests += [
        Request(f"image-{room}", "", (2,), 20, ids=(*image, *plain[: tail - room]))
        for room in (1, 4, 7)
    ]
    return drive(llm, requests)


def turns(llm: LLM, kind: str, batches: Sequence[Sequence[Request]]) -> Results:
    """Serve one batch of requests after another."""
    results: Results = {}
    for batch in batches:
        results |= drive(llm, batch)
    return results


def short(llm: LLM, kind: str, count: int = 12, max_tokens: int = 6) -> Results:
    """Serve prompts of one and two tokens, all of them in one step."""
    ids = [tuple(range(40 + i, 41 + i + i % 2)) for i in range(count)]
    return drive(
        llm, [Request(f"short-{i}", "", (), max_tokens, ids=one) for i, one in enumerate(ids)]
    )


SCENARIOS: Mapping[str, Callable[..., Results]] = {
    function.__name__: function
    for function in (mixed, text, prefix, split, abort, features, edge, turns, short)
}
