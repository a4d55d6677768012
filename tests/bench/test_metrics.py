"""Metrics on numbers computed by hand, their intervals, and the glossary page."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from vllm_vispec.bench.intervals import Measured, with_interval
from vllm_vispec.bench.metrics import (
    METRICS,
    Value,
    baseline_key,
    by_key,
    measure,
    only_family,
    percentile,
)
from vllm_vispec.bench.schema import CellKey, CellResult, MemoryFacts, Request, SpecCounters
from vllm_vispec.utils.errors import ViSpecError

GLOSSARY = Path(__file__).resolve().parents[2] / "docs" / "glossary.md"
SECTION = re.compile(r"(<!-- metrics: [^>]*-->\n).*?(<!-- /metrics -->)", re.DOTALL)

KEY = CellKey("vispec", 1, 3, 0.0, -1, "tiny")


def request(name: str, tokens: int, ttft: float, e2e: float, gaps: int) -> Request:
    gap = (e2e - ttft) / gaps if gaps else 0.0
    return Request(name, name[0], f"says {name}", tokens, 40, ttft, e2e, (gap,) * gaps)


# One repetition of two samples. Decode time per token after the first: plain 0.4 / 4 and 1.0 / 10,
# side 0.2 / 4 in 2 rounds and 0.5 / 10 in 5 rounds.
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
    SpecCounters(rounds=7, draft_tokens=21, accepted_tokens=7, accepted_by_position=(4, 2, 1)),
    MemoryFacts(4 * 2**30, 850, image_table_hits=3, image_table_misses=1),
    "vllm serve",
)

BY_HAND: dict[str, Value] = {
    "tokens_per_round": 2.0,
    "accepted_draft": 1.0,
    "accepted_at": (4 / 7, 2 / 7, 1 / 7),
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


@pytest.mark.parametrize("name", METRICS)
def test_nothing_to_compute_from(name: str) -> None:
    failed = replace(SIDE, requests=(), spec=None, error="the server did not start")
    for cells in ([], [failed]):
        assert measure(name, cells, [PLAIN]) is None
        assert with_interval(name, cells, [PLAIN]) == Measured(None)


def test_plain_drafts_nothing_and_is_as_fast_as_itself() -> None:
    assert measure("tokens_per_round", [PLAIN]) is None
    assert measure("accepted_at", [PLAIN]) is None
    assert measure("image_table_hit_rate", [PLAIN]) is None
    assert measure("tokens_per_chunk", [PLAIN]) == pytest.approx(1.0)
    assert measure("decode_speedup", [PLAIN], [PLAIN]) == pytest.approx(1.0)


def test_a_comparing_metric_needs_plain() -> None:
    compared = [name for name, metric in METRICS.items() if metric.compares]
    assert compared == ["decode_speedup", "e2e_speedup", "ttft_ratio", "identical_outputs"]
    assert all(measure(name, [SIDE]) is None for name in compared)


def test_acceptance_is_pooled_over_repetitions() -> None:
    counters = SpecCounters(
        rounds=1, draft_tokens=2, accepted_tokens=2, accepted_by_position=(1, 1)
    )
    cells = [SIDE, replace(SIDE, repetition=1, spec=counters)]
    # Not (1 + 2) / 2, the mean of both; a shorter chain accepted nothing at the third position.
    assert measure("accepted_draft", cells) == pytest.approx(9 / 8)
    assert measure("accepted_at", cells) == pytest.approx((5 / 8, 3 / 8, 1 / 8))


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


def test_one_family() -> None:
    cells, plain = only_family([SIDE], "a"), only_family([PLAIN], "a")
    assert measure("decode_speedup", cells, plain) == pytest.approx(2.0)
    assert measure("mean_output_tokens", cells) == pytest.approx(5.0)
    assert measure("tokens_per_chunk", cells) == pytest.approx(2.0)
    # What is known of the whole cell only is not claimed of a part.
    for name in ("tokens_per_round", "output_throughput", "peak_memory", "kv_blocks"):
        assert measure(name, cells) is None


def test_percentile_is_numpys() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    for share in (0.0, 0.025, 0.5, 0.9, 0.99, 1.0):
        assert percentile(values, share) == pytest.approx(numpy.percentile(values, 100 * share))
    assert percentile([], 0.5) is None


def test_cells_by_key() -> None:
    groups = by_key([replace(SIDE, repetition=1), PLAIN, SIDE])
    assert list(groups) == [KEY, baseline_key(KEY)]
    assert [cell.repetition for cell in groups[KEY]] == [0, 1]


def test_unknown_metric() -> None:
    with pytest.raises(ViSpecError, match="metric speed is unknown; there are tokens_per_round, "):
        measure("speed", [SIDE])


def test_interval_of_a_constant_has_no_width() -> None:
    found = with_interval("decode_speedup", [SIDE], [PLAIN])
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_interval_covers_the_samples() -> None:
    # Speedups of 1 and 3 with equal weight: a resample has 1, 2 or 3, each end in a quarter.
    plain = replace(
        PLAIN, requests=(request("a1", 11, 0.1, 3.1, 3), request("b1", 11, 0.1, 3.1, 3))
    )
    side = replace(SIDE, requests=(request("a1", 11, 0.1, 3.1, 3), request("b1", 11, 0.1, 1.1, 3)))
    found = with_interval("decode_speedup", [side], [plain])
    assert (found.value, found.low, found.high) == pytest.approx((1.5, 1.0, 3.0))
    assert found == with_interval("decode_speedup", [side], [plain])


def test_interval_covers_the_repetitions() -> None:
    better = SpecCounters(
        rounds=7, draft_tokens=21, accepted_tokens=14, accepted_by_position=(7, 4, 3)
    )
    cells = [SIDE, replace(SIDE, repetition=1, spec=better, wall_s=4.0)]
    found = with_interval("tokens_per_round", cells)
    assert (found.value, found.low, found.high) == pytest.approx((2.5, 2.0, 3.0))
    at = with_interval("accepted_at", cells)
    assert at.low == pytest.approx((4 / 7, 2 / 7, 1 / 7))
    assert at.high == pytest.approx((1.0, 4 / 7, 3 / 7))
    # Tokens are not redrawn where the seconds are those of the whole cell.
    throughput = with_interval("output_throughput", cells)
    assert (throughput.low, throughput.high) == pytest.approx((4.0, 16.0))


def test_sides_stay_paired_in_a_resample() -> None:
    slow = replace(PLAIN, repetition=1, requests=tuple(_slower(r, 9) for r in PLAIN.requests))
    slow_side = replace(SIDE, repetition=1, requests=tuple(_slower(r, 9) for r in SIDE.requests))
    found = with_interval("decode_speedup", [SIDE, slow_side], [PLAIN, slow])
    assert (found.low, found.high) == pytest.approx((2.0, 2.0))


def test_no_interval_from_one_thing() -> None:
    assert with_interval("tokens_per_round", [SIDE]) == Measured(2.0)
    assert with_interval("peak_memory", [SIDE, replace(SIDE, repetition=1)]) == Measured(4.0)
    single = replace(SIDE, requests=SIDE.requests[:1])
    assert with_interval("mean_output_tokens", [single]) == Measured(5.0)


def test_definitions_fit_a_table() -> None:
    for metric in METRICS.values():
        assert "|" not in metric.definition + metric.formula
        assert metric.definition.endswith(".")
