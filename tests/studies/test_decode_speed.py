"""The arithmetic of decode-speed, without engines."""

from __future__ import annotations

import pytest

from benchmarks.decode_speed import summarise, to_table
from benchmarks.turns import Reply, compare

PLAIN = Reply(((5, 6, 7, 8, 9, 2),), ((),), 1.0, 1.4)
FAST = Reply(PLAIN.token_ids, ((2, 0, 3),), 0.4, 0.9)
SLOW = Reply(PLAIN.token_ids, ((2, 0, 3),), 0.8, 1.3)
WRONG = Reply(((5, 6, 7, 8, 9, 3),), ((2, 0, 3),), 0.4, 0.9)


def test_one_k() -> None:
    found = summarise(3, [[compare(("charts",), PLAIN, reply)] for reply in (FAST, SLOW)])
    assert found["decode_speedup_per_repetition"] == pytest.approx([2.5, 1.25])
    assert found["decode_speedup"] == pytest.approx(2.0 / 1.2)
    assert found["decode_speedup_interval_95"] == pytest.approx([2.0 / 1.2] * 2)
    assert found["e2e_speedup"] == pytest.approx(2.8 / 2.2)
    assert found["acceptance_length"] == pytest.approx(1 + 5 / 3)
    assert found["acceptance_rate_per_position"] == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    assert (found["plain_ttft"], found["vispec_ttft"]) == pytest.approx((0.4, 0.5))
    assert (found["identical"], found["total"], found["output_tokens"]) == (1, 1, 6)
    assert to_table([found]).row_count == 1


def test_one_different_repetition_is_a_difference() -> None:
    found = summarise(3, [[compare(("charts",), PLAIN, reply)] for reply in (FAST, WRONG)])
    assert found["identical"] == 0
