"""The setting that tuning prints is taken by vLLM as it is meant, in both releases."""

from __future__ import annotations

import json

import pytest

from tests.bench.fakes import HEAD, TARGET
from tests.bench.made_up_speeds import run_with
from tests.support.child import run_in_subprocess
from tests.support.runners import environment
from vllm_vispec.bench.schema import BenchRun
from vllm_vispec.bench.tune import Tuning

SPEEDS = {
    1: {0: 0.97, 1: 1.4, 3: 2.0},
    4: {0: 0.97, 1: 1.3, 3: 1.2},
    32: {0: 0.99, 1: 0.9, 3: 0.7},
}


@pytest.mark.parametrize(
    ("name", "version"),
    [
        pytest.param("v1", "0.32", marks=pytest.mark.slow),
        pytest.param("v1-overlay", "0.33", marks=pytest.mark.overlay),
    ],
)
def test_vllm_takes_the_setting(name: str, version: str) -> None:
    run = run_with(SPEEDS)
    tuning = Tuning.from_run(BenchRun(1, {}, {"head": str(HEAD)}, run.cells))
    # As on a command line.
    config = json.loads(json.dumps(tuning.config))
    kwargs = {
        "target": str(TARGET),
        "config": config,
        "sizes": [1, 2, 4, 10, 11, 32, 100],
        "max_num_seqs": 128,
    }
    (found,) = run_in_subprocess("tests.bench.config_jobs:resolve", kwargs, environment(name))
    assert found["version"].startswith(version)
    assert found["k"] == [3, 1, 1, 1, 0, 0, 0]
