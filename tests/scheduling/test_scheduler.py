"""K of single steps, with requests that are stand-ins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_vispec.scheduling import control
from vllm_vispec.scheduling.control import DraftControl, Sleep, ladder
from vllm_vispec.scheduling.scheduler import ViSpecScheduler

K = 5


def scheduling(*, asynchronous: bool = False, **limits: Any) -> Any:
    """Return a scheduler with requests "a" to "h" that have answered a token each, but for "h"."""
    made: Any = object.__new__(ViSpecScheduler)
    made.control, made._sleep = DraftControl(ladder(K)), Sleep()
    made.num_spec_tokens, made._limits, made._gaps = K, limits, set()
    made.scheduler_config = SimpleNamespace(async_scheduling=asynchronous)
    made.requests = {
        name: SimpleNamespace(num_output_tokens=int(name != "h"), spec_token_ids=[1] * K)
        for name in "abcdefgh"
    }
    return made


def step(made: Any, names: str, tokens: int = 1) -> int:
    """Return K of a step of these requests with so many tokens each."""
    scheduled = dict.fromkeys(names, tokens)
    output = SimpleNamespace(
        num_scheduled_tokens=scheduled, total_num_scheduled_tokens=tokens * len(names)
    )
    return int(made._choose(output))


@pytest.mark.parametrize(
    ("names", "limits", "wanted"),
    [
        ("ab", {}, K),
        ("ab", {"a": 0}, K),
        ("ab", {"a": 0, "b": 2}, 2),
        # The ladder has no 4 and no 3.
        ("ab", {"a": 3, "b": 4}, 2),
        ("ab", {"a": 0, "b": 0}, 0),
    ],
)
def test_k_is_what_some_request_wants(names: str, limits: dict[str, Any], wanted: int) -> None:
    made = scheduling(**limits)
    assert step(made, names) == wanted
    made._cut(names)
    cut = {name: len(made.requests[name].spec_token_ids) for name in names}
    assert cut == {name: limits.get(name, K) for name in names}


@pytest.mark.parametrize(("asynchronous", "wanted"), [(False, 0), (True, K)])
def test_first_tokens_wait_for_no_drafts(asynchronous: bool, wanted: int) -> None:
    assert step(scheduling(asynchronous=asynchronous), "h", 30) == wanted
    assert step(scheduling(asynchronous=asynchronous), "ah", 30) == K


def test_who_was_decoded_while_the_draft_slept_gets_no_drafts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control, "_LEAST_WAIT", 40)
    monkeypatch.setattr(control, "SLEEP_AFTER", 8)
    made = scheduling()
    for _ in range(80):
        if k := step(made, "ab"):
            made.control.saw_draft(k, 0)
    assert made._gaps == {"a", "b"}
    # A pause has passed: whoever is new is drafted for again, and only they.
    assert step(made, "abc") == 1
    made._cut("abc")
    assert [len(made.requests[name].spec_token_ids) for name in "abc"] == [0, 0, K]


def test_gaps_end_where_requests_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scheduling(a=2, d=0)
    made._gaps = {"a", "b", "c", "d"}
    monkeypatch.setattr(Scheduler, "_update_after_schedule", lambda *_: None)
    output = SimpleNamespace(
        # On V2 vLLM lists resumed requests among the new ones.
        scheduled_new_reqs=[SimpleNamespace(req_id="a")],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids={"b"}),
        finished_req_ids={"d"},
        num_scheduled_tokens={},
    )
    made._update_after_schedule(output)
    assert (made._gaps, made._limits) == ({"c"}, {"a": 2})


@pytest.mark.parametrize(
    ("given", "limits"), [("x", {}), ({"num_speculative_tokens": 2}, {"a": 2})]
)
def test_a_request_that_no_front_process_checked_ends_no_engine(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    given: Any,
    limits: dict[str, int],
) -> None:
    """Ray Serve builds the configuration elsewhere, so that our check of requests is not there."""
    made, added = scheduling(), []
    made.vllm_config = SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=K), additional_config={}
    )
    monkeypatch.setattr(Scheduler, "add_request", lambda _, request: added.append(request))
    params = SimpleNamespace(extra_args={"vispec": given})
    made.add_request(SimpleNamespace(request_id="a", sampling_params=params))
    assert len(added) == 1
    assert made._limits == limits
    assert ("a is drafted for as any" in caplog.text) == (not limits)


@pytest.mark.parametrize(
    ("k", "before", "drafted", "prompt", "is_timed"),
    [
        (K, K, "aabb", 0, True),
        (0, 0, "", 0, True),
        # Somebody asked for fewer of them, or for none.
        (K, K, "abb", 0, True),
        (K, K, "bb", 0, False),
        (K, 1, "aabb", 0, False),
        (K, K, "aabb", 30, False),
    ],
)
def test_steps_that_only_decode_are_timed(
    k: int, before: int, drafted: str, prompt: int, is_timed: bool
) -> None:
    made, seen = scheduling(), []
    made.clock, made._last_step = lambda: 3.0, (before, 1.0)
    made.has_unfinished_requests = lambda: True
    output = SimpleNamespace(
        num_spec_tokens_to_schedule=k,
        num_scheduled_tokens={"a": 0, "b": 0},
        scheduled_spec_decode_tokens={name: [1] * drafted.count(name) for name in {*drafted}},
        total_num_scheduled_tokens=2 + len(drafted) + prompt,
    )
    made._time(output, SimpleNamespace(saw_step=lambda *step: seen.append(step)))
    assert seen == ([(k, 2, 2.0)] if is_timed else [])
    assert made._last_step == (k, 3.0)


def test_what_vllm_refuses_with_drafts_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scheduling()
    made.vllm_config = SimpleNamespace(use_v2_model_runner=True)
    monkeypatch.setattr(Scheduler, "add_request", lambda *_: None)
    for name, bias in (("a", {7: 1.0}), ("b", None)):
        params = SimpleNamespace(logit_bias=bias, min_p=0.0, extra_args=None)
        made.add_request(SimpleNamespace(request_id=name, sampling_params=params))
    assert made._limits == {"a": 0}
