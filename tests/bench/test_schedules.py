"""A schedule of K: read from what users have, given to a side, written as vLLM wants it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.fakes import SAMPLES, SETTINGS, World
from vllm_vispec.bench.matrix import different_settings
from vllm_vispec.bench.runner import run_matrix
from vllm_vispec.bench.schedules import SETTING, merged_ranges, read_schedule
from vllm_vispec.bench.schema import BenchRun
from vllm_vispec.utils.errors import ViSpecError

RANGES = ((1, 4, 5), (5, 16, 0))
TEXT = "[[1, 4, 5], [5, 16, 0]]"


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        json.dumps({"schedule": RANGES, "speculative_config": {}}),
        json.dumps({"method": "vispec", "num_speculative_tokens": 5, SETTING: RANGES}),
    ],
)
def test_forms_that_are_read(text: str, tmp_path: Path) -> None:
    assert read_schedule(text) == RANGES
    file = tmp_path / "tune.json"
    file.write_text(text)
    assert read_schedule(str(file)) == RANGES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.json", "nowhere.json cannot be read"),
        ("[1, 2", "is not JSON"),
        ("{}", "is not a list of ranges"),
        ("[[1, 4]]", "is not a list of ranges"),
        ("[[1, 4, true]]", "is not a list of ranges"),
        ("[[1, 4, -1]]", "is not a list of ranges"),
        ("[[4, 1, 2]]", "is not a list of ranges"),
        ("[[2, 4, 3]]", "does not begin at 1"),
        ("[[1, 4, 3], [4, 8, 1]]", "overlaps"),
        ("[[1, 4, 0]]", "drafts at no batch size"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ViSpecError, match=message):
        read_schedule(text)


def test_merged_ranges() -> None:
    chosen = [(1, 5), (2, 5), (4, 3), (16, 0)]
    assert merged_ranges(chosen) == ((1, 3, 5), (4, 15, 3), (16, 16, 0))
    assert merged_ranges(chosen, midway=True) == ((1, 2, 5), (3, 7, 3), (8, 16, 0))
    assert merged_ranges([(8, 2)]) == ((1, 8, 2),)


def test_the_side_needs_a_schedule() -> None:
    with pytest.raises(ViSpecError, match="vispec_tuned needs --schedule"):
        replace(SETTINGS, sides=("plain", "vispec_tuned"))
    with pytest.raises(ViSpecError, match="does not begin at 1"):
        replace(SETTINGS, schedule=((2, 4, 1),))


def test_a_schedule_may_come_later_but_not_change() -> None:
    without, given = SETTINGS.to_json(), replace(SETTINGS, schedule=RANGES).to_json()
    assert different_settings(without, given) is None
    assert different_settings(given, without) is None
    other = replace(SETTINGS, schedule=((1, 4, 5),)).to_json()
    assert different_settings(given, other) == "schedule"


def test_a_run_gets_the_tuned_side_later(tmp_path: Path) -> None:
    world = World()
    run_matrix(SETTINGS, SAMPLES, tmp_path, tools=world.tools())
    tuned = replace(SETTINGS, sides=("plain", "vispec", "vispec_tuned"), schedule=RANGES)
    run_matrix(tuned, SAMPLES, tmp_path, tools=world.tools())
    run = BenchRun.load(tmp_path)
    assert run.settings["schedule"] == [list(entry) for entry in RANGES]
    commands = [cell.command for cell in run.cells if cell.key.side == "vispec_tuned"]
    assert len(commands) == 1
    assert f'"{SETTING}": {TEXT}' in commands[0]
