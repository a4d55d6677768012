"""K by counts and by step times that are given: nothing here reads a clock."""

from __future__ import annotations

from itertools import pairwise

import pytest

from vllm_vispec.scheduling.control import DraftControl, ladder, ladder_schedule
from vllm_vispec.trees.settings import TreeSettings

K = 5
TREE, NODES = TreeSettings(depth=3), 29


def drive(
    control: DraftControl,
    steps: int,
    *,
    accepted: int,
    batch: int = 1,
    per_token: float | None = None,
) -> list[int]:
    """Return K of each step; of its drafts ``accepted`` are right.

    ``per_token`` is what a draft token adds to a plain step's time of 1; None: nothing is timed.
    """
    found: list[int] = []
    for _ in range(steps):
        k = control.choose(batch, batch)
        if found and k == found[-1] and per_token is not None:
            control.saw_step(k, batch, 1 + per_token * k)
        found.append(k)
        for _ in range(batch if k else 0):
            control.saw_draft(k, min(k, accepted))
    return found


@pytest.mark.parametrize(
    ("most", "tree", "choices", "requests", "schedule"),
    [
        (5, None, [5, 2, 1, 0], 100, [[1, 97, 5], [98, 98, 2], [99, 99, 1], [100, 100, 0]]),
        (5, None, [5, 2, 1, 0], 3, [[1, 1, 5], [2, 2, 2], [3, 3, 0]]),
        (5, None, [5, 2, 1, 0], 1, [[1, 1, 5]]),
        (1, None, [1, 0], None, [[1, 1, 1], [2, 2, 0]]),
        (NODES, TREE, [NODES, 0], 64, [[1, 63, NODES], [64, 64, 0]]),
    ],
)
def test_the_ladder_and_what_vllm_is_told(
    most: int,
    tree: TreeSettings | None,
    choices: list[int],
    requests: int | None,
    schedule: list[list[int]],
) -> None:
    assert ladder(most, tree) == choices
    assert ladder_schedule(choices, requests) == schedule


@pytest.mark.parametrize(
    ("accepted", "per_token", "batch", "wanted"),
    [
        (5, 0.05, 1, 5),
        (5, 0.05, 64, 5),
        (3, 0.05, 8, 5),
        # Only the first token is ever right: more of them cost and bring nothing.
        (1, 0.2, 4, 1),
        (1, 0.2, 64, 1),
        # Right, and still not worth it: a batch that fills the device.
        (1, 1.2, 32, 0),
        (0, 0.05, 1, 0),
        (0, None, 64, 0),
        (4, None, 1, 5),
    ],
)
def test_the_number_follows_acceptance_and_cost(
    accepted: int, per_token: float | None, batch: int, wanted: int
) -> None:
    control = DraftControl(ladder(K))
    found = drive(control, 600, accepted=accepted, batch=batch, per_token=per_token)
    late = found[300:]
    assert late.count(wanted) > 0.9 * len(late)


@pytest.mark.parametrize(
    ("accepted", "per_token", "wanted"),
    [
        (3, 0.02, NODES),
        # Whole paths are accepted, and cost more than they bring.
        (4, 0.15, 0),
        (0, 0.02, 0),
        (0, None, 0),
        (4, None, NODES),
    ],
)
def test_trees_are_drafted_whole_or_not_at_all(
    accepted: int, per_token: float | None, wanted: int
) -> None:
    control = DraftControl(ladder(NODES, TREE), TREE)
    # Whatever is not known yet, no more tokens than a path has can be accepted.
    assert control.gain(NODES) == DraftControl(ladder(TREE.levels)).gain(TREE.levels)
    found = drive(control, 600, accepted=accepted, per_token=per_token)
    assert {*found} == {0, NODES}
    assert found[300:].count(wanted) > 0.9 * 300


def test_an_old_time_of_steps_without_drafts_does_not_count_forever() -> None:
    """They were slow when nothing was drafted; now all steps are fast, and drafts do not pay."""
    control = DraftControl(ladder(K))
    for _ in range(9):
        control.saw_step(0, 1, 10.0)
    found = drive(control, 900, accepted=1, per_token=1.5)
    assert found[600:].count(0) > 0.9 * 300


def test_a_head_that_accepts_nothing_is_drafted_with_rarely() -> None:
    control = DraftControl(ladder(K))
    found = drive(control, 10_000, accepted=0, per_token=0.1)
    # What is lost in all, in steps without drafts: 5 % of them are allowed.
    assert sum(0.1 * k for k in found) < 0.01 * len(found)
    # It is probed again, in pauses that grow.
    probes = [i for i in range(1, len(found)) if found[i] and not found[i - 1]]
    pauses = [later - earlier for earlier, later in pairwise(probes)]
    assert len(probes) >= 3
    assert pauses == sorted(pauses)
    # Many requests see it at once.
    assert drive(DraftControl(ladder(K)), 4, accepted=0, batch=64) == [K, 0, 0, 0]


def test_it_rises_when_acceptance_returns() -> None:
    control = DraftControl(ladder(K))
    assert drive(control, 400, accepted=0)[-1] == 0
    found = drive(control, 1200, accepted=4)
    assert found[-1] == K
    assert drive(control, 400, accepted=0)[-1] == 0


def test_trials_cost_little() -> None:
    control = DraftControl(ladder(K))
    found = drive(control, 5000, accepted=5, per_token=0.05)
    tokens = sum(1 + k for k in found)
    seconds = sum(1 + 0.05 * k for k in found)
    assert tokens / seconds > 0.97 * (1 + K) / (1 + 0.05 * K)


def test_each_load_has_its_own_number() -> None:
    control = DraftControl(ladder(K))
    for _ in range(20):
        few = drive(control, 50, accepted=2, batch=1, per_token=0.02)
        many = drive(control, 50, accepted=2, batch=32, per_token=1.5)
    assert few[-1] > 0
    assert many[-1] == 0


def test_nobody_to_draft_for() -> None:
    control = DraftControl(ladder(K))
    assert control.choose(4, 0) == 0
    assert control.choose(4, 1) == K


def test_the_log_says_once_when_it_went_down_and_why() -> None:
    control = DraftControl(ladder(K))
    lines = []
    for _ in range(400):
        drive(control, 1, accepted=0, batch=2)
        lines.append(control.news(2))
    (line,) = [one for one in lines if one]
    assert line.startswith("with 2 to 3 requests a step drafts 0 tokens instead of 5: with 5 it")
    assert line.endswith("takes 1.30 times as long as without")
