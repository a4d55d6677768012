"""Metrics on numbers computed by hand, their intervals, and the glossary page."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from vllm_vispec.bench.bootstrap import Measured, bootstrap, with_interval
from vllm_vispec.bench.metrics import (
    METRICS,
    Value,
    baseline_key,
    measure,
)
from vllm_vispec.bench.schema import CellKey, CellResult, MemoryFacts, Request, SpecCounters

GLOSSARY = Path(__file__).resolve().parents[2] / "docs" / "glossary.md"
SECTION = re.compile(r"(<!-- metrics: [^>]*-->\n).*?(<!-- /metrics -->)", re.DOTALL)

KEY = CellKey("vispec", 1, 3, 0.0, -1, "tiny")


def request(name: str, tokens: int, ttft: float, e2e: float, gaps: int) -> Request:
    gap = (e2e - ttft) / gaps if gaps else 0.0
    return Request(name, name[0], f"says {name}", tokens, 40, ttft, e2e, (gap,) * gaps)


# One repetition of two samples. Decode time per token after the first: plain 0.4 / 4 and 1.0 / 10,
# side 0.2 / 4 in 2 steps and 0.5 / 10 in 5 steps.
PLAIN = CellResult(
    baseline_key(KEY),
    0,
    (request("a1", 5, 0.10, 0.50, 4), request("b1", 11, 0.20, 1.20, 10)),
    1.7,
    None,
    MemoryFacts(3 * 2**30, 900),
    "vllm serve",
)
SIDE = CellResult(
    KEY,
    0,
    (request("a1", 5, 0.12, 0.32, 2), request("b1", 11, 0.22, 0.72, 5)),
    1.0,
    SpecCounters(steps=7, draft_tokens=21, accepted_tokens=7, accepted_by_position=(4, 2, 1)),
    MemoryFacts(4 * 2**30, 850, image_table_hits=3, image_table_misses=1),
    "vllm serve",
)

BY_HAND: dict[str, Value] = {
    "acceptance_length": 2.0,
    "mean_accepted_tokens": 1.0,
    "acceptance_rate_per_position": (4 / 7, 2 / 7, 1 / 7),
    "tokens_per_chunk": 14 / 7,
    "decode_speedup": (1.4 / 14) / (0.7 / 14),
    "e2e_speedup": 1.7 / 1.04,
    "ttft_p50": 170.0,
    "ttft_p99": 219.0,
    "ttft_ratio": 170 / 150,
    "tpot_p50": 50.0,
    "tpot_p99": 50.0,
    "itl_p50": 100.0,
    "itl_p99": 100.0,
    "output_throughput": 16.0,
    "identical_outputs": 1.0,
    "mean_output_tokens": 8.0,
    "failed_requests": 0.0,
    "peak_memory": 4.0,
    "kv_blocks": 850,
    "image_table_hit_rate": 0.75,
}


@pytest.mark.parametrize("name", METRICS)
def test_one_repetition(name: str) -> None:
    assert measure(name, [SIDE], [PLAIN]) == pytest.approx(BY_HAND[name])


def test_acceptance_is_pooled_over_repetitions() -> None:
    counters = SpecCounters(steps=1, draft_tokens=2, accepted_tokens=2, accepted_by_position=(1, 1))
    cells = [SIDE, replace(SIDE, repetition=1, spec=counters)]
    # Not (1 + 2) / 2, the mean of both; a shorter chain accepted nothing at the third position.
    assert measure("mean_accepted_tokens", cells) == pytest.approx(9 / 8)
    assert measure("acceptance_rate_per_position", cells) == pytest.approx((5 / 8, 3 / 8, 1 / 8))


def test_speedup_is_a_ratio_of_sums_over_samples_that_both_answered() -> None:
    extra = request("c1", 101, 0.1, 100.1, 100)
    plain = replace(PLAIN, requests=(*PLAIN.requests, extra))
    lost = replace(extra, error="timeout", output_text="", output_tokens=0)
    side = replace(SIDE, requests=(lost, *SIDE.requests))
    assert measure("decode_speedup", [side], [plain]) == pytest.approx(2.0)
    assert measure("e2e_speedup", [side], [plain]) == pytest.approx(1.7 / 1.04)
    assert measure("failed_requests", [side]) == pytest.approx(1 / 3)
    assert measure("mean_output_tokens", [side]) == pytest.approx(8.0)
    # Sum over sum: with a sample that does not gain, the mean of ratios would be 5 / 3.
    side = replace(SIDE, requests=(*SIDE.requests, extra))
    assert measure("decode_speedup", [side], [plain]) == pytest.approx(101.4 / 100.7)


def test_an_answer_of_one_token_counts_end_to_end_only() -> None:
    short = request("c1", 1, 0.3, 0.3, 0)
    side, plain = (replace(cell, requests=(*cell.requests, short)) for cell in (SIDE, PLAIN))
    assert measure("decode_speedup", [side], [plain]) == pytest.approx(2.0)
    assert measure("tpot_p99", [side]) == pytest.approx(50.0)
    assert measure("e2e_speedup", [side], [plain]) == pytest.approx(2.0 / 1.34)


def test_repetitions_are_compared_with_their_own_plain() -> None:
    slow = replace(PLAIN, repetition=1, requests=tuple(_slower(r, 3) for r in PLAIN.requests))
    second = replace(SIDE, repetition=1)
    # Orders differ, and the third repetition has no plain side: 2 and 6 pool to (1.4 + 4.2) / 1.4.
    cells = [second, SIDE, replace(SIDE, repetition=2)]
    assert measure("decode_speedup", cells, [PLAIN, slow]) == pytest.approx(4.0)
    failed = replace(slow, error="out of memory")
    assert measure("decode_speedup", cells, [PLAIN, failed]) == pytest.approx(2.0)


def _slower(one: Request, factor: float) -> Request:
    return replace(one, e2e_s=one.ttft_s + factor * one.decode_s)


def test_a_sample_asked_twice_is_paired_with_its_own_turn() -> None:
    again = request("a1", 5, 0.10, 0.90, 4)
    plain = replace(PLAIN, requests=(PLAIN.requests[0], again))
    side = replace(SIDE, requests=(SIDE.requests[0], SIDE.requests[0]))
    assert measure("decode_speedup", [side], [plain]) == pytest.approx((0.4 + 0.8) / 0.4)


def test_identical_outputs() -> None:
    first, second = SIDE.requests
    for other in (
        replace(second, output_text="says something else"),
        replace(second, output_tokens=12),
        replace(second, error="timeout"),
    ):
        assert (
            measure("identical_outputs", [replace(SIDE, requests=(first, other))], [PLAIN]) == 0.5
        )
    failed = replace(PLAIN.requests[1], error="timeout")
    assert measure("identical_outputs", [SIDE], [replace(PLAIN, requests=(failed,))]) is None
    warm = replace(SIDE, key=replace(KEY, temperature=1.0))
    assert measure("identical_outputs", [warm], [PLAIN]) is None


def test_interval_covers_the_samples() -> None:
    # Speedups of 1 and 3 with equal weight: a resample has 1, 2 or 3, each end in a quarter.
    plain = replace(
        PLAIN, requests=(request("a1", 11, 0.1, 3.1, 3), request("b1", 11, 0.1, 3.1, 3))
    )
    side = replace(SIDE, requests=(request("a1", 11, 0.1, 3.1, 3), request("b1", 11, 0.1, 1.1, 3)))
    found = with_interval("decode_speedup", [side], [plain])
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.0, 3.0))
    assert found == with_interval("decode_speedup", [side], [plain])


def test_sides_stay_paired_in_a_resample() -> None:
    slow = replace(PLAIN, repetition=1, requests=tuple(_slower(r, 9) for r in PLAIN.requests))
    slow_side = replace(SIDE, repetition=1, requests=tuple(_slower(r, 9) for r in SIDE.requests))
    found = with_interval("decode_speedup", [SIDE, slow_side], [PLAIN, slow])
    assert (found.low, found.high) == pytest.approx((2.0, 2.0))


def test_no_interval_from_one_thing() -> None:
    side, plain = (replace(cell, requests=cell.requests[:1]) for cell in (SIDE, PLAIN))
    assert with_interval("e2e_speedup", [side], [plain]) == Measured(0.5 / 0.32)
    assert with_interval("e2e_speedup", [SIDE], []) == Measured(None)


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
