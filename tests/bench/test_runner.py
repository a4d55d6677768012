"""Running a matrix, with stand-ins for servers and load."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bench.fakes import SAMPLES, SETTINGS, TARGET, World, answer, lines
from tests.support.tiny_store import TinyStore
from vllm_vispec.bench.load import LoadJob
from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.runner import run_matrix
from vllm_vispec.bench.schedules import SETTING
from vllm_vispec.bench.schema import (
    CELLS_FILE,
    PACKED_FILE,
    RUN_FILE,
    BenchRun,
    BenchSample,
    SpecCounters,
)
from vllm_vispec.bench.server import EXTENSION, option_value, serve_arguments
from vllm_vispec.utils.errors import ViSpecError

BOTH = SETTINGS.replace(concurrency=(1, 2), repetitions=2, warm_up=1)
RANGES = ((1, 4, 5), (5, 16, 0))


def run(
    folder: Path,
    world: World | None = None,
    settings: MatrixSettings = SETTINGS,
    samples: tuple[BenchSample, ...] = SAMPLES,
) -> tuple[int, int, int]:
    """Measured, failed and found cells of one call."""
    outcome = run_matrix(settings, samples, folder, tools=(world or World()).tools())
    return outcome.measured, outcome.failed, outcome.found


def test_servers_are_up_together_and_loaded_one_at_a_time(tmp_path: Path) -> None:
    world = World()
    assert run(tmp_path, world, BOTH) == (8, 0, 0)
    plain, vispec = "load plain 3", "load vispec 3"
    warm = ["load plain 1", "load vispec 1"]
    order = [plain, vispec, vispec, plain, vispec, plain, plain, vispec]
    assert world.loads() == [*warm, *order]
    assert [event for event in world.events if "stop" in event] == ["stop vispec", "stop plain"]
    assert not world.up()
    again = World()
    assert run(tmp_path, again, BOTH) == (0, 0, 8)
    assert again.events == []


def test_records(tmp_path: Path) -> None:
    run(tmp_path, settings=BOTH)
    found = BenchRun.load(tmp_path)
    assert found.settings["samples"] == len(SAMPLES)
    assert found.settings["variants"] == ["plain", "vispec"]
    assert len(found.cells) == 8
    for cell in found.cells:
        speculates = cell.key.variant == "vispec"
        assert cell.error is None
        assert cell.requests == tuple(answer(sample) for sample in SAMPLES)
        assert cell.memory.kv_blocks == 10
        lookups = cell.memory.image_table_hits, cell.memory.image_table_misses
        assert lookups == ((6, 3) if speculates else (None, None))
        serve, load = cell.command.splitlines()
        assert serve.startswith(f"vllm serve {TARGET} --seed 1 --generation-config vllm")
        assert f"--max-concurrency {cell.key.concurrency}" in load
        assert cell.spec == (SpecCounters(6, 24, 6, (6, 0, 0, 0)) if speculates else None)
        assert ("--speculative-config" in serve) == speculates
        assert (f"--worker-extension-cls {EXTENSION}" in serve) == speculates
    assert BenchRun.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_cell_asks_as_many_questions_as_its_load_needs(tmp_path: Path) -> None:
    world = World()
    samples = tuple(replace(SAMPLES[0], sample_id=f"s{number}") for number in range(10))
    run(tmp_path, world, SETTINGS.replace(concurrency=(1, 3, 8), least=4, warm_up=1), samples)
    plain = [event for event in world.loads() if "plain" in event]
    assert plain == [f"load plain {number}" for number in (1, 4, 6, 10)]
    for cell in BenchRun.load(tmp_path).cells:
        number = {1: 4, 3: 6, 8: 10}[cell.key.concurrency]
        names = [request.sample_id for request in cell.requests]
        assert names == [sample.sample_id for sample in samples[:number]]
        file = tmp_path / "questions" / f"image_tokens_-1-first_{number}.jsonl"
        assert len(lines(file)) == number
        assert f"--dataset-path {file} --num-prompts {number}" in cell.command


def test_a_failed_cell_is_recorded_and_tried_again_later(tmp_path: Path) -> None:
    def fail(job: LoadJob) -> None:
        if job.concurrency == 2 and "vispec" in job.url:
            raise ViSpecError("the load took longer than 3 s")

    settings = BOTH.replace(repetitions=1)
    assert run(tmp_path, World(on_load=fail), settings) == (3, 1, 0)
    (failed,) = [cell for cell in BenchRun.load(tmp_path).cells if cell.error]
    assert (failed.key.variant, failed.key.concurrency) == ("vispec", 2)
    assert failed.error == "the load took longer than 3 s"
    assert len(failed.command.splitlines()) == 2

    world = World()
    assert run(tmp_path, world, settings) == (1, 0, 3)
    assert [event for event in world.events if event.startswith("start")] == ["start vispec"]
    assert not any(cell.error for cell in BenchRun.load(tmp_path).cells)
    assert len(lines(tmp_path / "cells.jsonl")) == 5


def test_runs_of_earlier_versions_and_packed_ones_are_continued(tmp_path: Path) -> None:
    settings, cells = tmp_path / RUN_FILE, tmp_path / CELLS_FILE
    assert run(tmp_path, settings=BOTH) == (8, 0, 0)
    for file, names in (
        (settings, {"variants": "sides"}),
        (cells, {"variant": "side", "steps": "rounds"}),
    ):
        text = file.read_text()
        for now, then in names.items():
            assert f'"{now}":' in text
            text = text.replace(f'"{now}":', f'"{then}":')
        file.write_text(text)
    assert run(tmp_path, settings=BOTH) == (0, 0, 8)
    (tmp_path / PACKED_FILE).write_bytes(gzip.compress(cells.read_bytes()))
    cells.unlink()
    more = BOTH.replace(repetitions=3)
    assert [run(tmp_path, settings=more) for _ in range(2)] == [(4, 0, 8), (0, 0, 12)]
    assert len(BenchRun.load(tmp_path).cells) == 12


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_variant_that_does_not_start_fails_alone(
    tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_vispec.bench.server.starts_at_once", lambda: at_once)
    world = World(broken={"vispec"})
    assert run(tmp_path, world, BOTH) == (4, 4, 0)
    assert world.events.count("start vispec") == 1
    errors = {cell.error for cell in BenchRun.load(tmp_path).cells if cell.key.variant == "vispec"}
    assert errors == {"server of vispec ended: no such thing"}


def test_a_server_that_dies_is_started_once_more(tmp_path: Path) -> None:
    def die(job: LoadJob) -> None:
        if "vispec" in job.url and len(job.samples) == len(SAMPLES):
            world.servers[job.url].is_up = False

    world = World(on_load=die)
    assert run(tmp_path, world, BOTH) == (4, 4, 0)
    assert world.events.count("start vispec") == 2
    cells = [cell for cell in BenchRun.load(tmp_path).cells if cell.key.variant == "vispec"]
    assert [cell.error for cell in cells] == [
        *["server of vispec does not answer"] * 2,
        *["server of vispec died twice"] * 2,
    ]


def test_interrupted_run_stops_its_servers_and_goes_on_later(tmp_path: Path) -> None:
    def kill(job: LoadJob) -> None:
        if len(world.loads()) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    world = World(on_load=kill)
    settings = BOTH.replace(warm_up=0)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, world, settings)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not world.up()
    assert run(tmp_path, settings=settings) == (5, 0, 3)


def test_a_run_may_be_widened(tmp_path: Path) -> None:
    run(tmp_path)
    tuned = SETTINGS.replace(variants=("plain", "vispec", "vispec_tuned"), schedule=RANGES)
    wider = tuned.replace(concurrency=(4,), repetitions=2)
    assert run(tmp_path, settings=wider) == (6, 0, 0)
    # Without the schedule again: it may be left out.
    assert run(tmp_path) == (0, 0, 2)
    found = BenchRun.load(tmp_path)
    assert (found.settings["concurrency"], found.settings["repetitions"]) == ([1, 4], 2)
    assert found.settings["schedule"] == [list(entry) for entry in RANGES]
    commands = [cell.command for cell in found.cells if cell.key.variant == "vispec_tuned"]
    assert all(f'"{SETTING}": {json.dumps(RANGES)}' in command for command in commands)
    other = tuned.replace(schedule=((1, 4, 5),))
    with pytest.raises(ViSpecError, match="was measured with schedule "):
        run(tmp_path, settings=other)


STAR = SETTINGS.replace(design="star", concurrency=(1, 4))


@pytest.mark.parametrize(
    ("settings", "change", "samples", "name"),
    [
        (SETTINGS, {"serve_args": ()}, SAMPLES, "serve_args"),
        (SETTINGS, {}, SAMPLES[:2], "samples"),
        (SETTINGS, {}, (*SAMPLES[:2], replace(SAMPLES[2], max_tokens=9)), "samples_digest"),
        (STAR, {"concurrency": (8, 1)}, SAMPLES, "concurrency"),
        (STAR, {"design": "full"}, SAMPLES, "design"),
    ],
)
def test_other_settings_need_another_folder(
    tmp_path: Path,
    settings: MatrixSettings,
    change: dict[str, Any],
    samples: tuple[BenchSample, ...],
    name: str,
) -> None:
    run(tmp_path, settings=settings)
    with pytest.raises(ViSpecError, match=f"--output .* was measured with {name} "):
        run(tmp_path, settings=settings.replace(**change), samples=samples)


def test_a_cut_off_line_is_measured_again(tmp_path: Path) -> None:
    run(tmp_path)
    file = tmp_path / "cells.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    assert run(tmp_path) == (1, 0, 1)
    assert len(BenchRun.load(tmp_path).cells) == 2


def test_a_folder_in_use(tmp_path: Path) -> None:
    def second(job: LoadJob) -> None:
        with pytest.raises(ViSpecError, match="in use by another benchmark"):
            run(tmp_path)
        tried.append(job)

    tried: list[LoadJob] = []
    run(tmp_path, World(on_load=second))
    assert len(tried) == 2


def test_nothing_is_started_without_samples_or_ports(tmp_path: Path) -> None:
    world = World()
    with pytest.raises(ViSpecError, match="--dataset openai has no samples"):
        run(tmp_path, world, samples=())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ViSpecError, match=f"port {port} is in use"):
            run_matrix(SETTINGS, SAMPLES, tmp_path, port, tools=world.tools())
    assert world.events == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "/"}, r"--target / has no config\.json"),
        ({"target": "some/where/else"}, r"--target some/where/else has no config\.json"),
        ({"head": "./nowhere"}, "nowhere"),
        ({"variants": ("plain", "eagle"), "eagle_head": "./nowhere"}, "--eagle-head .* has no c"),
    ],
)
def test_missing_target_and_heads(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    world = World()
    with pytest.raises(ViSpecError, match=message):
        run(tmp_path, world, SETTINGS.replace(**change))
    assert world.events == []


def test_a_published_model_is_a_draft_if_it_fits(tiny: TinyStore, tmp_path: Path) -> None:
    settings, world = SETTINGS.replace(target=str(tiny.target())), World()
    other = settings.replace(head=tiny.sibling("qwen3_vl"))
    with pytest.raises(ViSpecError, match="is of family qwen3_vl, the target of qwen2_5_vl"):
        run(tmp_path, world, other)
    zeroed = settings.replace(head=tiny.sibling(), variants=("plain", "vispec_zeroed"))
    with pytest.raises(ViSpecError, match="leave vispec_zeroed out"):
        run(tmp_path, world, zeroed)
    assert world.events == []
    assert run(tmp_path, world, settings.replace(head=tiny.sibling()))[0] > 0


def test_options_of_all_variants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_vispec.bench.server.has_gpu", lambda: True)
    arguments = serve_arguments(SETTINGS, "vispec", tmp_path, 4, servers=3)
    assert arguments[:3] == (str(TARGET), "--seed", "1")
    assert option_value(arguments, "--gpu-memory-utilization") == "0.300"
    ngram = serve_arguments(SETTINGS, "ngram", tmp_path, 4, servers=3)
    assert option_value(ngram, "--worker-extension-cls") == EXTENSION
    own = SETTINGS.replace(serve_args=("--gpu_memory_utilization=0.4",))
    arguments = serve_arguments(own, "plain", tmp_path, 4, servers=3)
    assert option_value(arguments, "--gpu-memory-utilization") == "0.4"
    assert option_value(arguments, "--speculative-config") is None
