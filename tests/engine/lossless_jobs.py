"""Child-process jobs of the lossless tests: scenarios served by one engine after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tests.engine.spies import watch
from tests.engine.workloads import (
    Request,
    Results,
    as_json,
    drive,
    forget,
    image_text,
    mixed_requests,
    words,
)
from tests.support import draft_logits, engine
from tests.support.tiny_configs import FAMILIES

if TYPE_CHECKING:
    from vllm import LLM

JSON_SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "solid": {"type": "boolean"},
    },
    "required": ["color", "count", "solid"],
    "additionalProperties": False,
}


def serve(setups: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Start one engine per setup and serve its scenarios one after another.

    A setup has a ``name``, the ``kind`` of its target, ``options`` of :class:`engine.EngineOptions`
    and ``scenarios``: labels with keyword arguments, among them ``run``, a name in
    :data:`SCENARIOS` (default: the label).
    """
    for setup in setups:
        with engine.engine(engine.EngineOptions(**setup["options"])) as llm:
            for scenario, kwargs in setup["scenarios"].items():
                forget(llm)
                spy, before = watch(llm), _metrics(llm)
                results = SCENARIOS[kwargs.pop("run", scenario)](llm, setup["kind"], **kwargs)
                yield {
                    "setup": setup["name"],
                    "scenario": scenario,
                    "results": as_json(results),
                    "spy": spy.to_json(),
                    "metrics": {k: v - before[k] for k, v in _metrics(llm).items()},
                    "table": _table(llm),
                }


def _metrics(llm: LLM) -> dict[str, float]:
    names = ("vllm:num_preemptions", "vllm:prefix_cache_hits", "vllm:spec_decode_num_drafts")
    return {name: engine.metric_value(llm, name) for name in names}


def _table(llm: LLM) -> dict[str, int]:
    """Return the counters of the table of image rows, nothing for other proposers."""
    runner = draft_logits.model_runner(llm)
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    rows = getattr(drafter, "draft_rows", None)
    return dict(vars(rows.table.stats)) if rows else {}


def mixed(llm: LLM, kind: str, count: int = 64, max_tokens: int = 14) -> Results:
    """Serve requests of every kind at once."""
    return drive(llm, mixed_requests(kind, count, max_tokens))


def text(llm: LLM, kind: str, count: int = 24, max_tokens: int = 14) -> Results:
    """Serve those of the mixed requests that have no images at once."""
    requests = mixed_requests(kind, count, max_tokens)
    return drive(llm, [request for request in requests if not request.images])


def prefix(llm: LLM, kind: str) -> Results:
    """Ask three rounds of different questions about the same images, then cut an image in two."""
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


def _cut_by_block(llm: LLM, kind: str) -> str:
    """Return a prompt with a 16-token image across the border of the first two blocks.

    Two full blocks match; EAGLE drops the last match, so that the hit ends after 32 tokens.
    """
    tokenizer, count = llm.get_tokenizer(), 1
    while len(tokenizer.encode(words(3, count))) < 22:
        count += 1
    return f"{words(3, count)} {image_text(kind, 1)} {words(4, 40)}"


def abort(llm: LLM, kind: str) -> Results:
    """Abort requests in the queue, in their prefill and while they decode."""
    requests = mixed_requests(kind, 20, 20, seed=2)
    due = {requests[i].name: after for i, after in ((1, 2), (4, 5), (7, 9), (10, 3), (17, 1))}
    return drive(llm, requests, due)


def features(llm: LLM, kind: str, names: Sequence[str] = ()) -> Results:
    """Sampling features, all (or those of ``names``) in one batch."""
    from vllm.sampling_params import StructuredOutputsParams

    grammar = StructuredOutputsParams(json=JSON_SCHEMA)
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
    tokenizer, family = llm.get_tokenizer(), FAMILIES[kind]
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


Scenario = Callable[..., Results]


def short(llm: LLM, kind: str, count: int = 12, max_tokens: int = 6) -> Results:
    """Serve prompts of one and two tokens, all of them in one step."""
    ids = [tuple(range(40 + i, 41 + i + i % 2)) for i in range(count)]
    requests = [Request(f"short-{i}", "", (), max_tokens, ids=one) for i, one in enumerate(ids)]
    return drive(llm, requests)


SCENARIOS: Mapping[str, Scenario] = {
    function.__name__: function for function in (mixed, text, prefix, abort, features, edge, short)
}
