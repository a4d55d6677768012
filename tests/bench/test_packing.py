"""Runs that are kept in a repository are packed, and say the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.made_up_runs import made_up
from vllm_vispec.bench.schema import (
    CELLS_FILE,
    RUN_FILE,
    BenchRun,
    CellResult,
    pack,
    read_cells,
    unpack,
)
from vllm_vispec.utils.errors import ViSpecError

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def without_text(cell: CellResult) -> CellResult:
    """Measured gaps are whole microseconds, made-up ones are not."""
    gaps = [tuple(round(gap, 6) for gap in one.itl_s) for one in cell.requests]
    requests = zip(cell.requests, gaps, strict=True)
    return replace(
        cell, requests=tuple(replace(one, output_text="", itl_s=itl_s) for one, itl_s in requests)
    )


def same_texts(cells: tuple[CellResult, ...]) -> list[bool]:
    texts = [one.output_text for cell in cells for one in cell.requests]
    return [a == b for a in texts for b in texts]


def test_a_packed_run_says_the_same(tmp_path: Path) -> None:
    run = made_up()
    failed = replace(run.cells[0], repetition=9, requests=(), error="no server")
    broken = replace(run.cells[1].requests[0], error="timeout", output_text="")
    cells = (*run.cells, failed, replace(run.cells[1], repetition=9, requests=(broken,)))
    text = pack([cell.to_json() for cell in cells])
    (tmp_path / CELLS_FILE).write_text(text)
    (tmp_path / RUN_FILE).write_text(json.dumps({**run.to_json(), "cells": []}))
    found = BenchRun.load(tmp_path).cells
    assert [without_text(cell) for cell in found] == [without_text(cell) for cell in cells]
    assert same_texts(found) == same_texts(cells)
    assert len(text) < sum(len(json.dumps(cell.to_json())) for cell in cells) / 1.5


def test_a_damaged_packed_cell() -> None:
    cell = json.loads(pack([made_up().cells[0].to_json()]))
    for damage in ({"command": 7}, {"columns": {**cell["columns"], "itl_us": []}}):
        with pytest.raises(ViSpecError, match=r"1\. cell: .*data is damaged, run it again"):
            unpack([cell | damage])


def test_weight_of_what_is_kept() -> None:
    files = [file for file in RESULTS.rglob("*") if file.suffix in {".json", ".jsonl"}]
    assert sum(file.stat().st_size for file in files) < 1_500_000
    assert all("columns" in json.loads(line) for line in _lines())
    assert len(read_cells(RESULTS / "pair_report" / CELLS_FILE)) == len(_lines())


def _lines() -> list[str]:
    return (RESULTS / "pair_report" / CELLS_FILE).read_text().splitlines()
