"""The numbers of calls, their intervals, and engines that take turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks.calls import (
    Call,
    acceptance_length,
    decode_speedup,
    estimate,
    identical,
    ratio,
    step_cost,
)
from benchmarks.decode_speed import summarise
from benchmarks.turns import Reply, _accepted, compare, take_turns
from tests.studies.made_up import made_up_call, one_of_each

PLAIN = Reply(((5, 6, 7, 8, 9, 2),), ((),), 1.0, 1.4)
FAST = Reply(PLAIN.token_ids, ((2, 0, 3),), 0.4, 0.9)
SLOW = Reply(PLAIN.token_ids, ((2, 0, 3),), 0.8, 1.3)
WRONG = Reply(((5, 6, 7, 8, 9, 3),), ((2, 0, 3),), 0.4, 0.9)


@pytest.mark.parametrize(
    ("listed", "num_tokens", "steps"),
    [
        ([3, 0], 6, [3, 0]),
        # Two more tokens came from steps without drafts.
        ([3, 0], 8, [3, 0, 0, 0]),
        # The answer ended inside the last step.
        ([3, 5], 7, [3, 2]),
        ([], 3, [0, 0]),
    ],
)
def test_steps_without_drafts_are_counted(
    listed: list[int], num_tokens: int, steps: list[int]
) -> None:
    metrics = SimpleNamespace(per_step_accepted=listed)
    answer = SimpleNamespace(spec_decode_metrics=metrics, token_ids=[7] * num_tokens)
    assert _accepted(answer) == steps
    answer.spec_decode_metrics = None
    assert _accepted(answer) == []


def test_numbers_of_calls() -> None:
    calls = [made_up_call(5, 4.0), made_up_call(3, 4.0)]
    assert acceptance_length(calls) == 5
    assert decode_speedup(calls) == 3
    # 2 s a step, 1 s a pass.
    assert step_cost(calls) == 2
    assert identical(calls) == (2, 2)
    assert identical([replace(calls[0], identical=None)]) is None
    # Per token where answers differ.
    assert decode_speedup([replace(made_up_call(5, 2.0), decoded=(6,))]) == 3
    # A batch takes as many steps as its longest answer.
    both = made_up_call(5, 4.0, ("charts", "captioning"))
    assert step_cost([replace(both, accepted=((5,), (1, 1, 1, 1)))]) == 1


def test_interval_covers_seeds_and_questions() -> None:
    found = estimate([one_of_each(2)] * 3, acceptance_length)
    assert (found["mean"], found["low"], found["high"]) == (3.0, 3.0, 3.0)
    found = estimate([one_of_each(1), one_of_each(2), one_of_each(3)], acceptance_length)
    assert found["seeds"] == [2.0, 3.0, 4.0]
    assert (found["low"], found["high"]) == (2.0, 4.0)
    questions = [[*one_of_each(1), *one_of_each(5)]] * 3
    found = estimate(questions, acceptance_length)
    assert found["low"] < found["mean"] == 4.0 < found["high"]


def test_ratio_uses_the_same_draws() -> None:
    noisy = [[*one_of_each(1), *one_of_each(5)], [*one_of_each(2), *one_of_each(4)]]
    same = {"mean": 1.0, "low": 1.0, "high": 1.0, "seeds": [1.0, 1.0]}
    assert ratio(noisy, noisy, acceptance_length) == same


def test_one_k_of_the_decode_speed() -> None:
    def calls(*replies: Reply) -> list[list[Call]]:
        return [[compare(("charts",), PLAIN, reply)] for reply in replies]

    found = summarise(3, calls(FAST, SLOW))
    assert found["decode_speedup_per_repetition"] == pytest.approx([2.5, 1.25])
    assert found["decode_speedup"] == pytest.approx(2.0 / 1.2)
    assert found["decode_speedup_interval_95"] == pytest.approx([2.0 / 1.2] * 2)
    assert found["e2e_speedup"] == pytest.approx(2.8 / 2.2)
    assert found["acceptance_length"] == pytest.approx(1 + 5 / 3)
    assert found["acceptance_rate_per_position"] == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    assert (found["plain_ttft"], found["vispec_ttft"]) == pytest.approx((0.4, 0.5))
    assert (found["identical"], found["total"], found["output_tokens"]) == (1, 1, 6)
    # One different repetition is a difference.
    assert summarise(3, calls(FAST, WRONG))["identical"] == 0


def test_answers_are_compared_where_they_must_be_equal() -> None:
    plain = Reply(((1, 2, 3), (4, 5)), ((), ()), 2.0, 3.0)
    mine = Reply(((1, 2, 3), (4, 6)), ((1,), (0,)), 1.0, 2.0)
    families = ("charts", "captioning")
    assert compare(families, plain, mine).identical == (True, False)
    assert compare(families, plain, mine, is_greedy=False).identical is None
    assert compare(families, plain, mine).decoded == (2, 1)


@dataclass
class FakeEngine:
    """Answers with the samples' numbers; a draft's steps accept one token each."""

    name: str
    asked: list[tuple[tuple[int, ...], float]] = field(default_factory=list)

    def ask(self, samples: Sequence[int], temperature: float = 0.0) -> Reply:
        """Note what was asked."""
        self.asked.append((tuple(samples), temperature))
        ids = tuple((sample, 1, 2) for sample in samples)
        return Reply(ids, ((1,),) * len(ids), 0.5, 1.0)


def test_all_sides_are_asked_the_same() -> None:
    plain, *drafts = sides = [FakeEngine(name) for name in ("plain", "one", "two")]
    plan = [((number,), ("charts",)) for number in range(14)]
    rows = list(take_turns(cast(Any, plain), cast(Any, drafts), plan, 1.0))
    assert [len(row) for row in rows] == [2] * 14
    asked = [sorted(side.asked) for side in sides]
    assert asked[0] == asked[1] == asked[2]
    assert {temperature for _, temperature in asked[0]} == {1.0}
