"""Which rows of a first pass are computed, and where they go."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_vispec.engine.first_pass import FirstPassPlan, is_long, visible_rows

HOLE = 9


def test_holes_are_not_visible() -> None:
    codes = np.array([0, HOLE, HOLE, 1, 2, HOLE, 0], dtype=np.int32)
    assert visible_rows(codes, HOLE).tolist() == [0, 3, 4, 6]


def test_visible_rows_return_to_their_places() -> None:
    plan = FirstPassPlan(torch.tensor([0, 3, 4]), torch.tensor([3]))
    rows = torch.arange(10.0).view(5, 2)
    picked = plan.pick_visible(rows)
    assert picked.tolist() == [[0, 1], [6, 7], [8, 9]]
    back = plan.spread(picked, torch.full((5, 2), -1.0))
    assert back.tolist() == [[0, 1], [-1, -1], [-1, -1], [6, 7], [8, 9]]


@pytest.mark.parametrize(("sampled", "found"), [([0, 4], [0, 2]), ([3], [1])])
def test_sampled_rows_are_found_among_the_visible(sampled: list[int], found: list[int]) -> None:
    plan = FirstPassPlan(torch.tensor([0, 3, 4]), torch.tensor(sampled))
    assert plan.pick_sampled(torch.arange(3)).tolist() == found


def test_a_prompt_that_ends_in_a_hole_gets_some_row() -> None:
    """Also behind the last visible row."""
    plan = FirstPassPlan(torch.tensor([0, 3]), torch.tensor([2, 4]))
    assert plan.pick_sampled(torch.arange(2)).tolist() == [1, 1]


def test_without_holes_all_rows_are_visible() -> None:
    plan = FirstPassPlan(None, torch.tensor([2]))
    rows = torch.arange(4)
    assert plan.pick_visible(rows) is rows
    assert plan.pick_sampled(rows).tolist() == [2]
    assert plan.spread(rows, torch.zeros(4)) is rows


@pytest.mark.parametrize(
    ("num_rows", "on_cpu", "wanted"),
    [
        ([40], True, True),
        ([6] * 8, True, True),
        ([6], True, False),
        ([6] * 64, False, False),
        ([300, 6], False, True),
        ([], True, False),
    ],
)
def test_which_batches_are_planned(num_rows: list[int], on_cpu: bool, wanted: bool) -> None:
    assert is_long(num_rows, on_cpu=on_cpu) is wanted
