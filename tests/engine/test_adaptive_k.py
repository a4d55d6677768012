"""K follows acceptance, and single requests choose theirs; outputs stay plain vLLM's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest

from tests.support.engine import StartEngine, completions, greedy
from tests.support.runners import runners
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
LIMITS: list[Any] = [{"num_speculative_tokens": 0}, '{"num_speculative_tokens": 2}', None]
ADAPTIVE = {"config": {"adaptive": True}}


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
@pytest.mark.parametrize("runner", runners("v1", "v2", "v1-overlay", "v2-overlay", slow=["v2"]))
def test_a_request_chooses_its_number(
    engine: StartEngine, tiny: TinyStore, runner: str, mode: str
) -> None:
    plain = engine(runner).generate(PROMPTS, max_tokens=24)
    options = {"async_scheduling": mode == "async", "draft": tiny.head(), "num_draft_tokens": K}
    found = engine(runner, **options).run(_generate_each)
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    none, two, all_of_them = (one.drafted for one in found)
    assert none == []
    assert set(two) <= {1, 2}
    assert 2 in two
    assert K in all_of_them


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


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("runner", runners("v1", "v2", "v1-overlay", slow=["v2"]))
def test_k_falls_to_0_where_nothing_is_accepted_and_rises_again(
    engine: StartEngine, tiny: TinyStore, runner: str, mode: str
) -> None:
    options = {"async_scheduling": mode == "async", "draft": tiny.head(), "num_draft_tokens": K}
    plain = engine(runner).once(serve_requests, REQUESTS)
    found: Course = engine(runner, **options, **ADAPTIVE, name="adaptive").run(_fall_and_rise)
    # The first tokens wait for drafts only where vLLM returns them before these are made.
    assert found.numbers[0] == (K if mode == "async" else 0)
    assert K in found.numbers[:10]
    # Nothing runs of the draft in most steps with one token a request.
    assert found.fallen_to == 0
    assert found.asleep > 20
    assert found.numbers[-1] > 0
    assert sum(accepted for _, accepted in found.risen.steps()) > 0
    for served in (found.fallen, found.risen):
        assert_lossless(plain, served)
    assert [line for line in found.told if f"a step drafts 0 tokens instead of {K}" in line]
    assert [line for line in found.told if "tokens instead of 0" in line]


# What follows runs in the child.


def _generate_each(llm: LLM) -> Any:
    params = [
        greedy(24, extra_args=None if limit is None else {"vispec": limit}) for limit in LIMITS
    ]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [completions(output)[0] for output in outputs]


def _refusal(llm: LLM, given: Any) -> str:
    from vllm.exceptions import VLLMValidationError

    try:
        llm.generate(PROMPTS[0], greedy(2, extra_args={"vispec": given}), use_tqdm=False)
    except VLLMValidationError as error:
        return str(error)
    return "not refused"


def _fall_and_rise(llm: LLM) -> Course:
    """Serve while all drafts are wrong, then while they are right again."""
    scheduler, found = engine_core(llm).scheduler, Course()
    # Counts alone decide.
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
        stack.enter_context(patch.multiple(control, _LEAST_WAIT=40, _SETTLED=8, SLEEP_AFTER=8))
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
    proposer = drafter(llm)
    propose = proposer.propose

    def wrong(*args: Any, **kwargs: Any) -> Any:
        drafts = propose(*args, **kwargs)
        return (drafts + 1) % 32

    with patch.object(proposer, "propose", wrong):
        yield
