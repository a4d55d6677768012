"""K follows acceptance, and single requests choose theirs; outputs stay plain vLLM's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

from tests.support.drafts import tree
from tests.support.engine import StartEngine, completions, greedy
from tests.support.runners import marks
from tests.support.spies import drafter, engine_core
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import (
    Served,
    assert_lossless,
    forget,
    mixed_requests,
    serve_requests,
)
from vllm_vispec.scheduling import control

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

K = 5
REQUESTS = mixed_requests(KIND, 16, 60, seed=5)
PROMPTS = ["A user shows a red square.", "How many stars are there?", "Please answer with JSON."]
DRAFTS: Mapping[str, Mapping[str, Any]] = {"chain": {"num_draft_tokens": K}, "tree": tree(7)}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "chain": {"SLEEP_AFTER": 8},
    # Longer than steps without a tree are tried; trees of the tiny head gain little.
    "tree": {"SLEEP_AFTER": 12, "GUESSED_COST": 0.01},
}
LIMITED = {"chain": 2, "tree": 7}
"""What one request asks for; a tree is whole or not there."""


def _rows(chains: str, trees: str) -> list[Any]:
    """Return runners with chains, and with trees; V2 with the installed vLLM and trees are slow."""
    return [
        pytest.param(
            runner,
            draft,
            id=f"{runner}-{draft}",
            marks=marks(runner, runner == "v2" or draft == "tree"),
        )
        for draft, names in (("chain", chains), ("tree", trees))
        for runner in names.split()
    ]


@dataclass
class Course:
    """What happened while drafts were wrong and after it.

    Attributes:
        numbers: K of every step.
        asleep: Steps in which nothing of the draft ran.
        told: Lines of the log.
    """

    numbers: list[int] = field(default_factory=list)
    asleep: int = 0
    fallen_to: int = -1
    fallen: Served = field(default_factory=lambda: Served({}))
    risen: Served = field(default_factory=lambda: Served({}))
    told: list[str] = field(default_factory=list)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(("runner", "draft"), _rows("v1 v2 v1-overlay v2-overlay", "v1 v2"))
def test_a_request_chooses_its_number(
    engine: StartEngine, tiny: TinyStore, runner: str, draft: str, mode: str
) -> None:
    plain = engine(runner).generate(PROMPTS, max_tokens=24)
    options = {"async_scheduling": mode == "async", "draft": tiny.head(), **DRAFTS[draft]}
    limit, most = LIMITED[draft], DRAFTS[draft]["num_draft_tokens"]
    found = engine(runner, **options).run(_generate_each, limit)
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    none, some, all_of_them = (one.drafted for one in found)
    assert none == []
    assert max(some) == limit
    assert max(all_of_them) == most


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_speculative_tokens": K + 1}, f"=6 must be at most {K}"),
        ({"num_speculative_tokens": -1}, "must be a whole number from 0 on"),
        ({"num_speculative_token": 1}, 'did you mean "num_speculative_tokens"?'),
        ("{", "is not JSON: give"),
        (3, "is no object: give"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    engine: StartEngine, tiny: TinyStore, given: Any, said: str
) -> None:
    found = engine("v1", draft=tiny.head(), num_draft_tokens=K).run(_refusal, given)
    assert said in found
    assert 'extra_args["vispec"]' in found
    assert "\n" not in found


@pytest.mark.parametrize(("runner", "draft"), _rows("v2 v2-overlay", "v2"))
def test_what_vllm_refuses_with_drafts_goes_without_them(
    engine: StartEngine, tiny: TinyStore, runner: str, draft: str
) -> None:
    plain = engine(runner).run(_generate_refused)
    found = engine(runner, draft=tiny.head(), **DRAFTS[draft]).run(_generate_refused)
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    assert plain[0].token_ids.count(7) > 8
    biased, cut_off, others = (one.drafted for one in found)
    assert biased == cut_off == []
    assert others


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(("runner", "draft"), _rows("v1 v2 v1-overlay", "v1 v2"))
def test_k_falls_to_0_where_nothing_is_accepted_and_rises_again(
    engine: StartEngine, tiny: TinyStore, runner: str, draft: str, mode: str
) -> None:
    options = {"async_scheduling": mode == "async", "draft": tiny.head(), **DRAFTS[draft]}
    options |= {"config": {"adaptive": True}, "name": "adaptive"}
    plain = engine(runner).once(serve_requests, REQUESTS)
    found: Course = engine(runner, **options).run(_fall_and_rise, SETTINGS[draft])
    most = DRAFTS[draft]["num_draft_tokens"]
    # The first tokens wait for drafts only where vLLM returns them before these are made.
    assert found.numbers[0] == (most if mode == "async" else 0)
    assert most in found.numbers[:10]
    # Nothing runs of the draft in most steps with one token a request.
    assert found.fallen_to == 0
    assert found.asleep > 20
    # Now and then steps without trees are tried, nine at a time.
    assert max(found.numbers[-10:]) > 0, found.numbers
    assert sum(accepted for _, accepted in found.risen.steps()) > 0
    for served in (found.fallen, found.risen):
        assert_lossless(plain, served)
    assert [line for line in found.told if f"a step drafts 0 tokens instead of {most}" in line]
    assert [line for line in found.told if "tokens instead of 0" in line]


# What follows runs in the child.


def _generate_each(llm: LLM, limit: int) -> Any:
    asked = {"num_speculative_tokens": 0}, json.dumps({"num_speculative_tokens": limit}), None
    params = [greedy(24, extra_args=one and {"vispec": one}) for one in asked]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [completions(output)[0] for output in outputs]


def _generate_refused(llm: LLM) -> Any:
    changes: list[dict[str, Any]] = [
        {"logit_bias": {7: 50.0}},
        {"min_p": 0.2, "temperature": 1.0, "seed": 3},
        {},
    ]
    params = [greedy(12, **change) for change in changes]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [completions(output)[0] for output in outputs]


def _refusal(llm: LLM, given: Any) -> str:
    from vllm.exceptions import VLLMValidationError

    try:
        llm.generate(PROMPTS[0], greedy(2, extra_args={"vispec": given}), use_tqdm=False)
    except VLLMValidationError as error:
        return str(error)
    return "not refused"


def _fall_and_rise(llm: LLM, settings: Mapping[str, Any]) -> Course:
    """Serve while all drafts are wrong, then while they are right again."""
    scheduler, found = engine_core(llm).scheduler, Course()
    # Counts alone decide, and drafts that are right now and then pay.
    scheduler.clock = lambda: 0.0
    choose, saw = scheduler._choose, scheduler._sleep.saw
    module = import_module("vllm_vispec.scheduling.scheduler")
    forget(llm)

    def chosen(output: Any) -> int:
        found.numbers.append(choose(output))
        return found.numbers[-1]

    def counted(*args: Any) -> bool:
        is_asleep = saw(*args)
        found.asleep += is_asleep
        return is_asleep

    with ExitStack() as stack:
        stack.enter_context(patch.multiple(control, _LEAST_WAIT=40, _SETTLED=8, **settings))
        stack.enter_context(patch.object(scheduler, "_choose", chosen))
        stack.enter_context(patch.object(scheduler._sleep, "saw", counted))
        lines = stack.enter_context(patch.object(module.logger, "info"))
        with _wrong_drafts(llm):
            found.fallen = serve_requests(llm, REQUESTS)
            found.fallen_to = found.numbers[-1]
        forget(llm)
        found.risen = serve_requests(llm, REQUESTS)
        found.told = [call.args[1] for call in lines.call_args_list]
    return found


@contextmanager
def _wrong_drafts(llm: LLM) -> Iterator[None]:
    """Let the draft propose the token behind each that it means."""
    model = drafter(llm).model
    compute = model.compute_logits

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return compute(*args, **kwargs).roll(1, -1)

    with patch.object(model, "compute_logits", wrong):
        yield
