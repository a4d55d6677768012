"""Trying the chosen setting: served beside plain vLLM at every concurrency."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256

from vllm_vispec.bench.bootstrap import RESAMPLES
from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.schema import BenchRun
from vllm_vispec.bench.tune.gains import gains_of
from vllm_vispec.bench.tune.result import Tuning, Verdict

TUNED_SIDE = "vispec_tuned"


def verify_settings(tuning: Tuning, settings: MatrixSettings) -> MatrixSettings:
    """Return the matrix that tries the choice at every concurrency, all else as it was measured.

    Args:
        tuning: one with a config.
    """
    return replace(
        settings,
        sides=("plain", TUNED_SIDE),
        concurrency=tuple(tuning.gains),
        num_speculative_tokens=(tuning.highest,),
        schedule=tuning.ranges,
    )


def verify_folder(tuning: Tuning) -> str:
    """Return a folder's name, another one for every setting, so that each is tried afresh."""
    config = json.dumps(tuning.config, sort_keys=True)
    return f"verified-{sha256(config.encode()).hexdigest()[:8]}"


def verdicts(tuning: Tuning, run: BenchRun, resamples: int = RESAMPLES) -> tuple[Verdict, ...]:
    """Return how the setting did at every concurrency that was tuned."""
    gains = gains_of(run, TUNED_SIDE, tuning.by, resamples)
    found = {concurrency: next(iter(by_k.values())) for concurrency, by_k in gains.items()}
    return tuple(Verdict(concurrency, found.get(concurrency)) for concurrency in tuning.gains)
