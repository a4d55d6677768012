"""Speedups of a run by concurrency and K."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import exp, hypot, log

from vllm_vispec.bench.bootstrap import RESAMPLES
from vllm_vispec.bench.intervals import with_interval
from vllm_vispec.bench.metrics import by_key, plain_key
from vllm_vispec.bench.schema import BenchRun, CellKey
from vllm_vispec.bench.tune.choose import SPREAD_WITHOUT_INTERVAL, Gain

Gains = Mapping[int, Mapping[int, Gain]]
"""Concurrency -> K -> speedup."""
Condition = tuple[str, float, int]


def gains_of(
    run: BenchRun, side: str, by: str = "decode_speedup", resamples: int = RESAMPLES
) -> Gains:
    """Return what a side gains at every concurrency and K, in order.

    A run over several temperatures, numbers of image tokens or datasets counts them all: the
    geometric mean over those that were measured at every K of a concurrency.

    Args:
        by: "decode_speedup" or "e2e_speedup".
        resamples: of the bootstrap.
    """
    groups = by_key(run.cells)
    found: dict[int, dict[int, dict[Condition, Gain]]] = defaultdict(lambda: defaultdict(dict))
    for key in (key for key in groups if key.side == side):
        measured = with_interval(by, groups[key], groups.get(plain_key(key), ()), resamples)
        gain = _gain(measured.value, measured.low, measured.high)
        if gain is not None:
            found[key.concurrency][key.num_speculative_tokens][_condition(key)] = gain
    pooled = {concurrency: _pool(found[concurrency]) for concurrency in sorted(found)}
    return {concurrency: gains for concurrency, gains in pooled.items() if gains}


def _gain(value: object, low: object, high: object) -> Gain | None:
    if not isinstance(value, float) or value <= 0:
        return None
    if not (isinstance(low, float) and isinstance(high, float) and 0 < low <= high):
        return Gain(value)
    spread = max(log(high / value), log(value / low))
    return Gain(value, spread if spread > 0 else SPREAD_WITHOUT_INTERVAL)


def _condition(key: CellKey) -> Condition:
    return key.dataset, key.temperature, key.image_tokens


def _pool(by_k: Mapping[int, Mapping[Condition, Gain]]) -> dict[int, Gain]:
    """Average over the conditions that every K has."""
    shared = set.intersection(*(set(found) for found in by_k.values()))
    return {k: _mean([by_k[k][one] for one in sorted(shared)]) for k in sorted(by_k) if shared}


def _mean(gains: Sequence[Gain]) -> Gain:
    count = len(gains)
    value = exp(sum(log(gain.value) for gain in gains) / count)
    return Gain(value, hypot(*_spreads(gains)) / count)


def _spreads(gains: Iterable[Gain]) -> list[float]:
    return [gain.spread for gain in gains]
