"""The draft's own lm_head on one and on two ranks, and how both runners ask it; no engine."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.engine.vocab_head_jobs import IDS
from tests.support.child import run_in_subprocess
from tests.support.runners import RUNNERS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def check(world: int, runner: str, folder: Path) -> list[dict[str, Any]]:
    """Run every rank in a process of its own."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def one(rank: int) -> dict[str, Any]:
        kwargs = {"rank": rank, "world": world, "port": port, "folder": str(folder)}
        target = "tests.engine.vocab_head_jobs:check"
        item: dict[str, Any] = run_in_subprocess(target, kwargs, RUNNERS[runner].env())[0]
        return item

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


@pytest.mark.parametrize(
    ("world", "runner", "rows"),
    [
        (1, "v1", 448),
        pytest.param(1, "v1-overlay", 448, marks=pytest.mark.overlay),
        pytest.param(2, "v1", 224, marks=pytest.mark.slow),
    ],
)
def test_every_rank_chooses_what_one_would(
    tmp_path: Path, world: int, runner: str, rows: int
) -> None:
    assert len(IDS) <= 448
    for found in check(world, runner, tmp_path):
        assert found["unlisted_win"]
        assert found["top"] == found["v1"] == found["v2"] == found["wanted"]
        assert found["same_logits"]
        # Spread over ranks, padded by vLLM to a multiple of 64.
        assert found["rows"] == rows
