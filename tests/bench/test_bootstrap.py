"""The bootstrap behind every interval."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from vllm_vispec.bench.bootstrap import bootstrap


def test_of_one_axis_as_scipys() -> None:
    values = np.random.default_rng(1).exponential(size=80)
    mine = bootstrap(values, (0,), np.median, resamples=4000)
    theirs = scipy.stats.bootstrap(
        (values,), np.median, n_resamples=4000, method="percentile", random_state=2
    ).confidence_interval
    assert mine == pytest.approx(np.array(theirs), abs=0.05)


def test_crossed_axes_are_wider_than_one() -> None:
    """Each repetition has its own level: many samples do not make it better known."""
    noise = np.random.default_rng(3)
    table = noise.normal(size=(5, 1)) + 0.1 * noise.normal(size=(5, 200))
    width = {axes: np.ptp(bootstrap(table, axes, np.mean)) for axes in ((0, 1), (0,), (1,))}
    assert width[0, 1] == pytest.approx(width[0,], rel=0.1)
    assert width[0, 1] > 20 * width[1,]
    # Every drawn repetition has the same drawn samples: sums of rows and columns keep rank one.
    product = np.outer([1.0, 2.0, 5.0], [1.0, 3.0, 4.0, 9.0])
    rank = bootstrap(product, (0, 1), lambda drawn: np.linalg.matrix_rank(drawn))
    assert rank.tolist() == [1, 1]


def test_other_axes_stay_paired() -> None:
    values = np.random.default_rng(4).exponential(size=50)
    sides = np.stack([values, 3 * values])
    ratio = bootstrap(sides, (1,), lambda drawn: drawn[1].sum() / drawn[0].sum())
    assert ratio == pytest.approx(np.array([3.0, 3.0]))


def test_the_same_call_gives_the_same_numbers() -> None:
    values = np.arange(9.0)
    first, second = (bootstrap(values, (0,), np.mean).tolist() for _ in range(2))
    assert first == second
    assert first != bootstrap(values, (0,), np.mean, seed=1).tolist()
