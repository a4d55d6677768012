"""`vispec bench tune`: which K at which load, from measurements, and whether the choice holds.

Single paths that end early are chosen for like chains, each threshold by itself; then the best of
these choices is taken.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from math import exp, hypot, log
from typing import Any

from markupsafe import Markup

from vllm_vispec.bench.bootstrap import Measured, with_interval
from vllm_vispec.bench.matrix import MatrixSettings, find_variant, is_path
from vllm_vispec.bench.metrics import baseline_key, by_key
from vllm_vispec.bench.pages import to_markdown
from vllm_vispec.bench.schedules import Ranges, highest, merged_ranges, speculative_config
from vllm_vispec.bench.schema import BenchRun
from vllm_vispec.utils.errors import ViSpecError

TUNE_FILE = "tune.json"
FORMAT = 1
VARIANT, TUNED = "vispec", "vispec_tuned"
METRICS = ("decode_speedup", "e2e_speedup")
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

    def is_faster(self, other: Gain) -> bool:
        """Whether the 95 % interval of the gain over another one lies above 1.0.

        The two are taken as independent. They share their samples, so the true interval is
        narrower.
        """
        return log(self.value / other.value) > hypot(self.spread, other.spread)

    @property
    def is_ok(self) -> bool:
        """Whether nothing is lost."""
        return self.value >= FLOOR

    @property
    def text(self) -> str:
        """The value alone."""
        return f"{self.value:.2f}x"

    def to_json(self) -> dict[str, float]:
        """Return plain data."""
        return {"speedup": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        """Return the value with its interval."""
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


PLAIN = Gain(1.0, 0.0)
"""What K = 0 is taken for where it was not measured."""
Gains = Mapping[int, Mapping[int, Gain]]
"""Concurrency -> K -> speedup."""


def fastest_k(gains: Mapping[int, Gain]) -> int:
    """Return the K with the highest speedup, the smaller one of two that are equal."""
    known = {0: PLAIN, **gains}
    return max(sorted(known), key=lambda k: known[k].value)


def choose_k(gains: Mapping[int, Gain]) -> int:
    """Return the smallest K that is not measurably slower than the fastest.

    A larger K costs tail latency and memory traffic, so it has to be worth it: the interval of its
    gain over the smaller K must lie above 1.0. A smaller K that itself loses against plain vLLM is
    not taken for that.

    Args:
        gains: by K; 0 is taken for plain vLLM's speed if it was not measured.
    """
    known, fastest = {0: PLAIN, **gains}, fastest_k(gains)
    even = [k for k in sorted(known) if not known[fastest].is_faster(known[k])]
    return next((k for k in even if known[k].value >= FLOOR), fastest)


def gains_of(run: BenchRun, variant: str, by: str = METRICS[0]) -> Gains:
    """Return what a variant gains at every concurrency and K, in order.

    A run over several temperatures, numbers of image tokens or datasets counts them all: the
    geometric mean over those that were measured at every K of a concurrency.

    Args:
        by: "decode_speedup" or "e2e_speedup".
    """
    groups = by_key(run.cells)
    found: dict[int, dict[int, dict[Any, Gain]]] = defaultdict(lambda: defaultdict(dict))
    for key in (key for key in groups if key.variant == variant):
        gain = _gain(with_interval(by, groups[key], groups.get(baseline_key(key), ())))
        if gain is not None:
            condition = key.dataset, key.temperature, key.image_tokens
            found[key.concurrency][key.num_speculative_tokens][condition] = gain
    pooled = {}
    for concurrency, by_k in sorted(found.items()):
        shared = sorted(set.intersection(*(set(gains) for gains in by_k.values())))
        if shared:
            pooled[concurrency] = {k: _mean([by_k[k][x] for x in shared]) for k in sorted(by_k)}
    return pooled


def _gain(found: Measured) -> Gain | None:
    if not found.value:
        return None
    if not found.low or not found.high:
        return Gain(found.value)
    spread = max(log(found.high / found.value), log(found.value / found.low))
    return Gain(found.value, spread or SPREAD_WITHOUT_INTERVAL)


def _mean(gains: list[Gain]) -> Gain:
    value = exp(sum(log(gain.value) for gain in gains) / len(gains))
    return Gain(value, hypot(*(gain.spread for gain in gains)) / len(gains))


@dataclass(frozen=True)
class Tuning:
    """A choice of K for every load.

    Attributes:
        run: what it was chosen from.
        by: the metric it was made by.
        gains: speedups by concurrency and K.
        chosen: K by concurrency.
        variant: what drafts: chains, or single paths with a threshold.
        others: the choices for the other variants.
        verified: what the setting itself gained, by concurrency, None where it was not measured;
            empty if it was not tried.
    """

    run: BenchRun
    by: str
    gains: Gains
    chosen: Mapping[int, int]
    variant: str = VARIANT
    others: tuple[Tuning, ...] = ()
    verified: Mapping[int, Gain | None] = field(default_factory=dict)

    @classmethod
    def from_run(cls, run: BenchRun, by: str = METRICS[0]) -> Tuning:
        """Choose from a run.

        Chains are chosen unless a threshold is measurably faster, on average over the loads.

        Raises:
            ViSpecError: the metric is unknown, or the run has no speedup of ViSpec.
        """
        if by not in METRICS:
            raise ViSpecError(f"--by {by} is unknown: choose from {', '.join(METRICS)}")
        gains = gains_of(run, VARIANT, by)
        if not gains:
            raise ViSpecError(
                f"the run has no {by} of the variant {VARIANT}: measure the variants plain and "
                f"{VARIANT}, and see the run's logs if cells failed"
            )
        chains = cls(run, by, gains, {load: choose_k(found) for load, found in gains.items()})
        every = [chains]
        for name in filter(is_path, dict.fromkeys(cell.key.variant for cell in run.cells)):
            of_paths = gains_of(run, name, by)
            if of_paths.keys() != gains.keys():
                continue  # it failed at a load, so it cannot be compared
            # At K = 0 nothing is drafted, whatever the threshold.
            both = {
                load: {k: gain for k, gain in found.items() if k == 0} | dict(of_paths[load])
                for load, found in gains.items()
            }
            chosen = {load: choose_k(found) for load, found in both.items()}
            every.append(cls(run, by, both, chosen, name))
        best = max(every, key=lambda one: one.overall.value)
        taken = best if best.overall.is_faster(chains.overall) else chains
        return replace(taken, others=tuple(one for one in every if one is not taken))

    @property
    def overall(self) -> Gain:
        """What the choice gains on average over the loads."""
        return _mean([self.gains[load].get(k, PLAIN) for load, k in self.chosen.items()])

    @property
    def ks(self) -> list[int]:
        """Every K that was measured at some load."""
        return sorted({k for found in self.gains.values() for k in found})

    @property
    def ranges(self) -> Ranges:
        """K by batch size, in order from 1 on."""
        return merged_ranges(sorted(self.chosen.items()), midway=True)

    @property
    def config(self) -> dict[str, Any] | None:
        """vLLM's speculative config; None if drafting gains at no load."""
        settings = self.run.settings
        draft = {"method": VARIANT, "model": settings.get("head") or "HEAD"}
        draft |= (settings.get("speculative_config") or {}) | self._tree
        return speculative_config(draft, self.ranges)

    @property
    def _tree(self) -> dict[str, Any]:
        variant = find_variant(self.variant)
        return variant.tree(highest(self.ranges)) if variant and highest(self.ranges) else {}

    @property
    def folder(self) -> str:
        """Name of the folder to try the setting in, another one for every setting."""
        config = json.dumps(self.config, sort_keys=True)
        return f"verified-{sha256(config.encode()).hexdigest()[:8]}"

    def verify_settings(self, settings: MatrixSettings) -> MatrixSettings:
        """Return the matrix that tries the choice at every concurrency, all else as measured."""
        return settings.replace(
            variants=("plain", TUNED),
            concurrency=tuple(self.gains),
            num_speculative_tokens=(highest(self.ranges),),
            schedule=self.ranges,
            speculative_config={**settings.speculative_config, **self._tree},
        )

    def with_verification(self, run: BenchRun) -> Tuning:
        """Return the tuning with how its setting did in a run of `verify_settings`."""
        gains = gains_of(run, TUNED, self.by)
        found = {concurrency: next(iter(by_k.values())) for concurrency, by_k in gains.items()}
        return replace(self, verified={one: found.get(one) for one in self.gains})

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        nothing = dict.fromkeys(("speedup", "low", "high"))
        return {
            "format": FORMAT,
            "by": self.by,
            "variant": self.variant,
            "machine": self.run.machine,
            "settings": self.run.settings,
            "rows": [
                {
                    "variant": one.variant,
                    "concurrency": concurrency,
                    "num_speculative_tokens": k,
                    **gain.to_json(),
                }
                for one in (self, *self.others)
                for concurrency, found in one.gains.items()
                for k, gain in found.items()
            ],
            "chosen": {str(concurrency): k for concurrency, k in self.chosen.items()},
            "schedule": [list(entry) for entry in self.ranges],
            "speculative_config": self.config,
            "verified": [
                {"concurrency": concurrency}
                | (gain.to_json() if gain else nothing)
                | {"ok": gain is not None and gain.is_ok}
                for concurrency, gain in self.verified.items()
            ],
        }

    def to_markdown(self) -> str:
        """Return tables, concurrency by K, the choice marked, and what follows from it.

        That is what to serve with, why not with the fastest K, and where it still loses.
        """
        return to_markdown(
            "tune.md.j2",
            tuning=self,
            measured=sorted((self, *self.others), key=lambda one: one.variant != VARIANT),
            config=None if self.config is None else Markup(json.dumps(self.config)),
            fastest_k=fastest_k,
            plain=PLAIN,
            floor=FLOOR,
        )
