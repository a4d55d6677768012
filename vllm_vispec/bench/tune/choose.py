"""Choosing a K from measured speedups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, hypot, log

FLOOR = 0.98
"""A speedup below it is a loss that is worth a word; above, plain vLLM is as good."""
SPREAD_WITHOUT_INTERVAL = log(1.03)
"""What two measurements without intervals must differ by to count as different."""


@dataclass(frozen=True)
class Gain:
    """A speedup over plain vLLM and how sure it is.

    Attributes:
        value: the speedup.
        spread: half of the 95 % interval's width, in logarithms.
    """

    value: float
    spread: float = SPREAD_WITHOUT_INTERVAL

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.value * exp(-self.spread)

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.value * exp(self.spread)


PLAIN = Gain(1.0, 0.0)
"""What K = 0 is taken for where it was not measured."""


def choose(gains: Mapping[int, Gain]) -> int:
    """Return the smallest K that is not measurably slower than the fastest.

    A larger K costs tail latency and memory traffic, so it has to be worth it: the interval of its
    gain over the smaller K must lie above 1.0. A smaller K that itself loses against plain vLLM is
    not taken for that.

    Args:
        gains: by K; 0 is taken for plain vLLM's speed if it was not measured.
    """
    known = {0: PLAIN, **gains}
    fastest = max(sorted(known), key=lambda k: known[k].value)
    even = [k for k in sorted(known) if not is_faster(known[fastest], known[k])]
    return next((k for k in even if known[k].value >= FLOOR), fastest)


def is_faster(one: Gain, other: Gain) -> bool:
    """Whether the 95 % interval of the gain of one over the other lies above 1.0.

    The two are taken as independent. They share their samples, so the true interval is narrower.
    """
    return log(one.value / other.value) > hypot(one.spread, other.spread)
