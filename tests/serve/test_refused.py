"""`vllm serve` with a setting that is refused: one line behind what vLLM logs, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.serve.server import ENVIRONMENT
from tests.support.child import REPOSITORY
from tests.support.tiny_store import TinyStore

MOST_LINES_OF_VLLM = 20
"""What vLLM prints before it reads the speculative config: banner, arguments, the model."""


@pytest.mark.serve
@pytest.mark.engine
@pytest.mark.timeout(300)
def test_one_line(tiny: TinyStore) -> None:
    model, head = str(tiny.target()), tiny.head()
    config = {"method": "vispec", "model": head, "num_speculative_token": 4}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    done = subprocess.run(
        [*command, "--speculative-config", json.dumps(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)},
        timeout=240,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stdout
    assert lines[-1] == (
        'vllm-vispec: speculative config: key "num_speculative_token" is unknown; '
        'did you mean "num_speculative_tokens"?'
    )
    assert len(lines) <= MOST_LINES_OF_VLLM, done.stdout
    assert not [line for line in lines if "Traceback" in line or "ERROR" in line]
