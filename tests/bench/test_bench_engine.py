"""The benchmark on the shipped pair, with real servers and the real load generator."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.pair_report import PAIR, SERVE_ARGS
from examples.tiny_vlm.questions import IMAGE_FAMILIES
from vllm_vispec.bench.datasets import DatasetOptions, load_dataset
from vllm_vispec.bench.load import LoadGenerator, LoadJob, LoadResult
from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.report import write_report
from vllm_vispec.bench.runner import Outcome, Tools, run_matrix
from vllm_vispec.bench.schema import BenchRun, CellResult
from vllm_vispec.bench.server import BenchServer
from vllm_vispec.cli.app import app

pytestmark = [
    pytest.mark.engine,
    pytest.mark.serve,
    pytest.mark.slow,
    pytest.mark.usefixtures("as_a_user"),
]

MAX_TOKENS = 12
VARIANTS = ("plain", "ngram", "eagle", "vispec_zeroed", "vispec")
KILLED = "ngram"
LAST = "image_tokens_256-"
"""Which server dies, and under the load of which cell: the last one, so that it stays dead."""


def test_quick(questions: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    given = ["bench", "quick", "--data", str(questions), "--output", str(output)]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = [line for line in result.output.splitlines() if line.startswith(("ok", "FAIL"))]
    assert len(found) == 2 * (1 + 3)
    assert all(line.startswith("ok ") for line in found)
    for cell in BenchRun.load(output).cells:
        check_cell(cell, 4, max_tokens=64)
        assert {request.family for request in cell.requests} == set(IMAGE_FAMILIES)


class OneDeath(LoadGenerator):
    """Loads of a run in which one server dies once, under the load of its last cell."""

    def __init__(self) -> None:
        self.servers: dict[str, BenchServer] = {}
        self.dies = True

    def make_server(self, *given: Any) -> BenchServer:
        server = BenchServer(*given)
        self.servers[server.url] = server
        return server

    def __call__(self, job: LoadJob) -> LoadResult:
        server = self.servers[job.url]
        if self.dies and server.variant == KILLED and LAST in job.questions.name:
            self.dies = False
            assert server._process is not None
            os.killpg(server._process.pid, signal.SIGKILL)
        return super().__call__(job)


def test_all_variants_with_one_that_dies(questions: Path, tmp_path: Path) -> None:
    settings = MatrixSettings(
        target=f"{PAIR}/target",
        dataset="tiny",
        head=f"{PAIR}/vispec_head",
        eagle_head=f"{PAIR}/eagle_text_head",
        variants=VARIANTS,
        design="star",
        concurrency=(1, 4),
        num_speculative_tokens=(5,),
        temperatures=(0.0, 1.0),
        image_tokens=(-1, 0, 256),
        repetitions=1,
        waves=1,
        least=6,
        warm_up=0,
        serve_args=SERVE_ARGS,
    )
    options = DatasetOptions(limit=6, max_tokens=MAX_TOKENS)
    samples = load_dataset("tiny", questions, options).samples
    assert {sample.family for sample in samples} == set(IMAGE_FAMILIES)
    assert any(sample.follow_up for sample in samples)
    loads = OneDeath()
    tools = Tools(make_server=loads.make_server, loads=loads)
    first = run_matrix(settings, samples, tmp_path / "run", tools=tools)
    assert first == Outcome(measured=24, failed=1, found=0)
    (failed,) = [cell for cell in BenchRun.load(tmp_path / "run").cells if cell.error]
    assert failed.key.variant == KILLED
    assert failed.command.count("\n") == 1
    second = run_matrix(settings, samples, tmp_path / "run", tools=tools)
    assert second == Outcome(measured=1, failed=0, found=24)
    run = BenchRun.load(tmp_path / "run")
    for cell in run.cells:
        check_cell(cell, 5, MAX_TOKENS)
    check_image_tokens(run)
    files = write_report(tmp_path / "run", tmp_path / "pages", resamples=50)
    assert "None: every cell that was asked for was measured" in files.markdown.read_text()


def check_cell(cell: CellResult, num_tokens: int, max_tokens: int) -> None:
    """Look at what every measured cell must have."""
    assert cell.error is None
    assert not [request.error for request in cell.requests if request.error]
    assert all(0 < request.ttft_s <= request.e2e_s for request in cell.requests)
    assert all(1 < request.output_tokens <= max_tokens for request in cell.requests)
    assert cell.memory.kv_blocks
    assert cell.memory.peak_bytes
    if cell.key.variant == "plain":
        assert cell.spec is None
        return
    assert cell.spec is not None
    assert sum(cell.spec.accepted_by_position) == cell.spec.accepted_tokens
    if cell.key.variant == "ngram":
        return
    assert 0 < cell.spec.draft_tokens <= num_tokens * cell.spec.steps
    looks_up = cell.key.variant.startswith("vispec") and cell.key.image_tokens != 0
    # Caches are emptied before a cell, so that every image is computed once.
    assert bool(cell.memory.image_table_misses) == looks_up
    assert bool(cell.memory.image_table_hits) == looks_up


def check_image_tokens(run: BenchRun) -> None:
    """A cell asks what it says: the same questions with so many more tokens."""
    lengths = {
        cell.key.image_tokens: sum(request.prompt_tokens for request in cell.requests)
        / len(cell.requests)
        for cell in run.cells
        if cell.key.variant == "plain" and cell.key.concurrency == 1 and cell.key.temperature == 0
    }
    # 256 and what begins and ends an image.
    assert lengths[256] - lengths[0] == pytest.approx(258, abs=4)
