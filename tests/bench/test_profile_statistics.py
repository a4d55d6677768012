"""Medians, ratios and intervals of made-up rounds."""

from __future__ import annotations

import pytest

from tests.bench.made_up_spans import DECODE, Tape
from vllm_vispec.bench.profile_result import Block, summarise


def block(eagle: float, vispec: float, rounds: int = 3) -> Block:
    """A block whose first passes take that long."""
    sides = []
    for seconds in (eagle, vispec):
        tape = Tape()
        for _ in range(rounds):
            tape.step(DECODE, first_pass=seconds)
        sides.append(tape.found().steps)
    return Block(*sides)


def test_ratio_of_medians_with_interval() -> None:
    summary = summarise([block(20, 10), block(22, 11), block(40, 20)])
    found = summary.parts["draft_first_pass"]
    assert summary.rounds == 9
    assert (found.eagle.median, found.vispec.median, found.ratio) == (22, 11, 0.5)
    assert found.ratio_interval_95 == (0.5, 0.5)
    assert found.eagle.interval_95 == (20, 40)
    assert found.ratio_first_decile == 0.5
    assert summary.parts["target_pass"].ratio_interval_95 == (1.0, 1.0)
    for side in ("eagle", "vispec"):
        assert set(summary.typical[side]) == set(summary.parts)


def test_interval_is_as_wide_as_blocks_differ() -> None:
    blocks = [block(20, 20 * factor) for factor in (0.8, 0.9, 1.0, 1.1, 1.2)]
    low, high = summarise(blocks).parts["draft_first_pass"].ratio_interval_95 or (0.0, 0.0)
    assert 0.8 <= low < 1.0 < high <= 1.2
    assert summarise(blocks) == summarise(blocks)


def test_typical_parts_add_up_to_a_round() -> None:
    blocks = [block(eagle, 10) for eagle in (20, 21, 22, 23, 24, 25, 26, 27, 28, 2000)]
    typical = summarise(blocks).typical["eagle"]
    assert sum(typical.values()) == pytest.approx(152 - 20 + 24.5, abs=1)


def test_one_block_has_no_interval() -> None:
    found = summarise([block(20, 10)]).parts["draft_first_pass"]
    assert (found.ratio, found.ratio_interval_95, found.eagle.interval_95) == (0.5, None, None)
