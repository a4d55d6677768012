"""What tuning found: the table, the choice, the setting, and how it did."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_vispec.bench.estimate.schedule import merged_ranges
from vllm_vispec.bench.schedules import Ranges, highest, speculative_config
from vllm_vispec.bench.schema import BenchRun
from vllm_vispec.bench.tune.choose import FLOOR, Gain, choose
from vllm_vispec.bench.tune.gains import Gains, gains_of
from vllm_vispec.utils.errors import ViSpecError

TUNE_FILE = "tune.json"
FORMAT = 1
SIDE = "vispec"
METRICS = ("decode_speedup", "e2e_speedup")


@dataclass(frozen=True)
class Verdict:
    """How the printed setting did against plain vLLM at one concurrency; None: not measured."""

    concurrency: int
    gain: Gain | None

    @property
    def ok(self) -> bool:
        """Whether nothing is lost."""
        return self.gain is not None and self.gain.value >= FLOOR

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"concurrency": self.concurrency, **_numbers(self.gain), "ok": self.ok}


@dataclass(frozen=True)
class Tuning:
    """A choice of K for every load.

    Attributes:
        by: the metric it was made by.
        draft: method and model of the speculative config.
        gains: speedups by concurrency and K.
        chosen: K by concurrency.
        verdicts: how the setting did; empty if it was not tried.
    """

    by: str
    draft: Mapping[str, Any]
    gains: Gains
    chosen: Mapping[int, int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    verdicts: tuple[Verdict, ...] = ()

    @classmethod
    def of(cls, run: BenchRun, by: str = METRICS[0]) -> Tuning:
        """Choose from a run.

        Raises:
            ViSpecError: the metric is unknown, or the run has no speedup of ViSpec.
        """
        if by not in METRICS:
            raise ViSpecError(f"--by {by} is unknown: choose from {', '.join(METRICS)}")
        gains = gains_of(run, SIDE, by)
        if not gains:
            raise ViSpecError(
                f"the run has no {by} of the side {SIDE}: measure the sides plain and {SIDE}, and "
                "see the run's logs if cells failed"
            )
        chosen = {concurrency: choose(found) for concurrency, found in gains.items()}
        head = run.settings.get("head") or "HEAD"
        draft = {"method": SIDE, "model": head}
        return cls(by, draft, gains, chosen, run.settings, run.machine)

    @property
    def ranges(self) -> Ranges:
        """K by batch size, in order from 1 on."""
        return tuple(merged_ranges(sorted(self.chosen.items()), midway=True))

    @property
    def config(self) -> dict[str, Any] | None:
        """vLLM's speculative config; None if drafting gains at no load."""
        return speculative_config(self.draft, self.ranges)

    @property
    def highest(self) -> int:
        """Largest K."""
        return highest(self.ranges)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        rows = [
            {"concurrency": concurrency, "num_speculative_tokens": k, **_numbers(gain)}
            for concurrency, found in self.gains.items()
            for k, gain in found.items()
        ]
        return {
            "format": FORMAT,
            "by": self.by,
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "rows": rows,
            "chosen": {str(concurrency): k for concurrency, k in self.chosen.items()},
            "schedule": [list(entry) for entry in self.ranges],
            "speculative_config": self.config,
            "verified": [verdict.to_json() for verdict in self.verdicts],
        }

    def to_markdown(self) -> str:
        """Return a table, concurrency by K, the choice marked."""
        ks = sorted({k for found in self.gains.values() for k in found})
        tuned = ["tuned"] if self.verdicts else []
        head = ["concurrency", *(f"K = {k}" for k in ks), "chosen", *tuned]
        lines = [f"{self.by} over plain vLLM, 95 % interval in brackets", "", _row(head)]
        lines.append(_row(["---"] * len(head)))
        verdicts = {verdict.concurrency: verdict.gain for verdict in self.verdicts}
        for concurrency, found in self.gains.items():
            k = self.chosen[concurrency]
            cells = [_text(found.get(one), one == k) for one in ks]
            last = [_text(verdicts.get(concurrency))] if self.verdicts else []
            lines.append(_row([str(concurrency), *cells, f"K = {k}", *last]))
        return "\n".join(lines)

    def advice(self) -> list[str]:
        """Return what to serve with, and where that still loses."""
        if self.config is None:
            return ["Drafting gains at no load that was measured: serve without it."]
        lines = [f"--speculative-config '{json.dumps(self.config)}'"]
        return lines + [self._lost(verdict) for verdict in self.verdicts if not verdict.ok]

    def _lost(self, verdict: Verdict) -> str:
        place = f"concurrency {verdict.concurrency}"
        if verdict.gain is None:
            return f"{place}: the setting was not measured"
        nothing_drafted = not self.chosen[verdict.concurrency]
        why = "; nothing is drafted there, what remains is the draft's first pass"
        return (
            f"{place}: {verdict.gain.value:.2f}x with this setting, below {FLOOR:g}x"
            f"{why if nothing_drafted else ''}"
        )


def _numbers(gain: Gain | None) -> dict[str, float | None]:
    if gain is None:
        return {"speedup": None, "low": None, "high": None}
    return {"speedup": gain.value, "low": gain.low, "high": gain.high}


def _text(gain: Gain | None, is_chosen: bool = False) -> str:
    if gain is None:
        return "-"
    text = f"{gain.value:.2f} ({gain.low:.2f} to {gain.high:.2f})"
    return f"**{text}**" if is_chosen else text


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
