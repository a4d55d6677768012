"""Running a matrix, with stand-ins for servers and load."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.fakes import HEAD, SAMPLES, SETTINGS, TARGET, World, answer, lines
from vllm_vispec.bench.load import (
    LoadError,
    LoadJob,
    LoadResult,
)
from vllm_vispec.bench.runner import check_inputs, run_matrix
from vllm_vispec.bench.schema import (
    BenchRun,
    BenchSample,
    MemoryFacts,
    SpecCounters,
)
from vllm_vispec.bench.server import (
    EXTENSION,
    option_value,
    serve_arguments,
)
from vllm_vispec.bench.variants import Heads
from vllm_vispec.utils.errors import ViSpecError

BOTH = replace(SETTINGS, concurrency=(1, 2), repetitions=2, warm_up=1)


def test_servers_are_up_together_and_loaded_one_at_a_time(tmp_path: Path) -> None:
    world = World()
    outcome = run_matrix(BOTH, SAMPLES, tmp_path, tools=world.tools())
    assert (outcome.measured, outcome.failed, outcome.found) == (8, 0, 0)
    plain, vispec = "load plain 3", "load vispec 3"
    warm = ["load plain 1", "load vispec 1"]
    order = [plain, vispec, vispec, plain, vispec, plain, plain, vispec]
    assert world.loads() == [*warm, *order]
    assert [event for event in world.events if "stop" in event] == ["stop vispec", "stop plain"]
    assert not world.up()


def test_records(tmp_path: Path) -> None:
    run_matrix(BOTH, SAMPLES, tmp_path, tools=World().tools())
    run = BenchRun.load(tmp_path)
    assert run.settings["samples"] == len(SAMPLES)
    assert run.settings["sides"] == ["plain", "vispec"]
    assert len(run.cells) == 8
    for cell in run.cells:
        assert cell.error is None
        assert cell.requests == tuple(answer(sample) for sample in SAMPLES)
        assert cell.memory.kv_blocks == 10
        serve, load = cell.command.splitlines()
        assert serve.startswith(f"vllm serve {TARGET} --seed 1 --generation-config vllm")
        assert f"--max-concurrency {cell.key.concurrency}" in load
        counted = SpecCounters(6, 24, 6, (6, 0, 0, 0))
        assert cell.spec == (counted if cell.key.side == "vispec" else None)
        assert ("--speculative-config" in serve) == (cell.key.side == "vispec")
        assert (f"--worker-extension-cls {EXTENSION}" in serve) == (cell.key.side == "vispec")
    assert BenchRun.from_json(json.loads(json.dumps(run.to_json()))) == run


def test_a_cell_asks_as_many_questions_as_its_load_needs(tmp_path: Path) -> None:
    world = World()
    samples = tuple(replace(SAMPLES[0], sample_id=f"s{number}") for number in range(10))
    settings = replace(SETTINGS, concurrency=(1, 3, 8), waves=2, least=4, warm_up=1)
    run_matrix(settings, samples, tmp_path, tools=world.tools())
    plain = [event for event in world.loads() if "plain" in event]
    assert plain == [f"load plain {number}" for number in (1, 4, 6, 10)]
    names = [sample.sample_id for sample in samples]
    for cell in BenchRun.load(tmp_path).cells:
        number = {1: 4, 3: 6, 8: 10}[cell.key.concurrency]
        assert [request.sample_id for request in cell.requests] == names[:number]
        file = tmp_path / "questions" / f"image_tokens_-1-first_{number}.jsonl"
        assert len(lines(file)) == number
        assert f"--dataset-path {file} --num-prompts {number}" in cell.command


def test_image_lookups_are_those_of_the_cell(tmp_path: Path) -> None:
    run_matrix(BOTH, SAMPLES, tmp_path, tools=World().tools())
    for cell in BenchRun.load(tmp_path).cells:
        found = cell.memory.image_table_hits, cell.memory.image_table_misses
        assert found == ((6, 3) if cell.key.side == "vispec" else (None, None))
    assert MemoryFacts(1, 2, 3, 4).since(MemoryFacts()) == MemoryFacts(1, 2)


def test_a_failed_cell_is_recorded_and_tried_again_later(tmp_path: Path) -> None:
    def fail(job: LoadJob) -> None:
        if job.concurrency == 2 and "vispec" in job.url:
            raise LoadError("the load took longer than 3 s")

    world = World(on_load=fail)
    settings = replace(BOTH, repetitions=1)
    outcome = run_matrix(settings, SAMPLES, tmp_path, tools=world.tools())
    assert (outcome.measured, outcome.failed) == (3, 1)
    failed = [cell for cell in BenchRun.load(tmp_path).cells if cell.error]
    assert [(cell.key.side, cell.key.concurrency, cell.error) for cell in failed] == [
        ("vispec", 2, "the load took longer than 3 s")
    ]
    assert len(failed[0].command.splitlines()) == 2

    world = World()
    outcome = run_matrix(settings, SAMPLES, tmp_path, tools=world.tools())
    assert (outcome.measured, outcome.failed, outcome.found) == (1, 0, 3)
    assert [event for event in world.events if event.startswith("start")] == ["start vispec"]
    assert not any(cell.error for cell in BenchRun.load(tmp_path).cells)
    assert len(lines(tmp_path / "cells.jsonl")) == 5


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_a_side_that_does_not_start_fails_alone(
    tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_vispec.bench.server.starts_at_once", lambda: at_once)
    world = World(broken={"vispec"})
    outcome = run_matrix(BOTH, SAMPLES, tmp_path, tools=world.tools())
    assert (outcome.measured, outcome.failed) == (4, 4)
    assert world.events.count("start vispec") == 1
    errors = {cell.error for cell in BenchRun.load(tmp_path).cells if cell.key.side == "vispec"}
    assert errors == {"server of vispec ended: no such thing"}


def test_a_server_that_dies_is_started_once_more(tmp_path: Path) -> None:
    def die(job: LoadJob) -> None:
        if "vispec" in job.url and len(job.samples) == len(SAMPLES):
            world.servers[job.url].alive = False

    world = World(on_load=die)
    outcome = run_matrix(BOTH, SAMPLES, tmp_path, tools=world.tools())
    assert (outcome.measured, outcome.failed) == (4, 4)
    assert world.events.count("start vispec") == 2
    cells = [cell for cell in BenchRun.load(tmp_path).cells if cell.key.side == "vispec"]
    assert [cell.error for cell in cells] == [
        *["server of vispec does not answer"] * 2,
        *["server of vispec died 2 times"] * 2,
    ]


def test_a_cell_without_any_answer_has_failed(tmp_path: Path) -> None:
    world = World()
    tools = replace(
        world.tools(),
        make_load=lambda job: LoadResult(tuple(answer(one, "Bad Request") for one in SAMPLES), 0.1),
    )
    outcome = run_matrix(SETTINGS, SAMPLES, tmp_path, tools=tools)
    assert (outcome.measured, outcome.failed) == (0, 2)
    (error,) = {cell.error for cell in BenchRun.load(tmp_path).cells}
    assert error == "no request was answered: Bad Request"


def test_interrupted_run_stops_its_servers_and_goes_on_later(tmp_path: Path) -> None:
    def kill(job: LoadJob) -> None:
        if len(world.loads()) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    world = World(on_load=kill)
    settings = replace(BOTH, warm_up=0)
    with pytest.raises(KeyboardInterrupt):
        run_matrix(settings, SAMPLES, tmp_path, tools=world.tools())
    assert not world.up()
    outcome = run_matrix(settings, SAMPLES, tmp_path, tools=World().tools())
    assert (outcome.measured, outcome.found) == (5, 3)


def test_a_finished_run_starts_nothing(tmp_path: Path) -> None:
    run_matrix(BOTH, SAMPLES, tmp_path, tools=World().tools())
    world = World()
    assert run_matrix(BOTH, SAMPLES, tmp_path, tools=world.tools()).found == 8
    assert world.events == []


def test_a_run_may_be_widened(tmp_path: Path) -> None:
    run_matrix(SETTINGS, SAMPLES, tmp_path, tools=World().tools())
    wider = replace(SETTINGS, concurrency=(4,), repetitions=2)
    outcome = run_matrix(wider, SAMPLES, tmp_path, tools=World().tools())
    assert (outcome.measured, outcome.found) == (4, 0)
    settings = BenchRun.load(tmp_path).settings
    assert (settings["concurrency"], settings["repetitions"]) == ([1, 4], 2)


@pytest.mark.parametrize(
    ("settings", "samples", "name"),
    [
        (replace(SETTINGS, serve_args=()), SAMPLES, "serve_args"),
        (SETTINGS, SAMPLES[:2], "samples"),
        (SETTINGS, (*SAMPLES[:2], replace(SAMPLES[2], max_tokens=9)), "samples_digest"),
    ],
)
def test_other_settings_need_another_folder(
    tmp_path: Path, settings: object, samples: tuple[BenchSample, ...], name: str
) -> None:
    run_matrix(SETTINGS, SAMPLES, tmp_path, tools=World().tools())
    with pytest.raises(ViSpecError, match=f"--output .* was measured with {name} "):
        run_matrix(settings, samples, tmp_path, tools=World().tools())  # type: ignore[arg-type]


def test_a_cut_off_line_is_measured_again(tmp_path: Path) -> None:
    run_matrix(SETTINGS, SAMPLES, tmp_path, tools=World().tools())
    file = tmp_path / "cells.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    outcome = run_matrix(SETTINGS, SAMPLES, tmp_path, tools=World().tools())
    assert (outcome.measured, outcome.found) == (1, 1)
    assert len(BenchRun.load(tmp_path).cells) == 2


def test_a_folder_in_use(tmp_path: Path) -> None:
    def second(job: LoadJob) -> None:
        with pytest.raises(ViSpecError, match="in use by another benchmark"):
            run_matrix(SETTINGS, SAMPLES, tmp_path, tools=World().tools())
        tried.append(job)

    tried: list[LoadJob] = []
    run_matrix(SETTINGS, SAMPLES, tmp_path, tools=World(on_load=second).tools())
    assert len(tried) == 2


def test_nothing_is_started_without_samples_or_ports(tmp_path: Path) -> None:
    world = World()
    with pytest.raises(ViSpecError, match="--dataset openai has no samples"):
        run_matrix(SETTINGS, (), tmp_path, tools=world.tools())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ViSpecError, match=f"port {port} is in use"):
            run_matrix(SETTINGS, SAMPLES, tmp_path, port, tools=world.tools())
    assert world.events == []


def test_missing_target_and_heads(tmp_path: Path) -> None:
    check_inputs(SETTINGS)
    with pytest.raises(ViSpecError, match=r"--target .* has no config\.json"):
        check_inputs(replace(SETTINGS, target=str(tmp_path)))
    with pytest.raises(ViSpecError, match="--target some/where/else does not exist"):
        check_inputs(replace(SETTINGS, target="some/where/else"))
    with pytest.raises(ViSpecError, match="nowhere"):
        check_inputs(replace(SETTINGS, head=str(tmp_path / "nowhere")))
    eagle = replace(SETTINGS, sides=("plain", "eagle"), eagle_head=str(tmp_path / "nowhere"))
    with pytest.raises(ViSpecError, match=r"--eagle-head .*nowhere has no config"):
        check_inputs(eagle)


def test_options_of_all_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = Heads(str(TARGET), str(HEAD), "", tmp_path)
    monkeypatch.setattr("vllm_vispec.bench.server.has_gpu", lambda: True)
    arguments = serve_arguments(SETTINGS, "vispec", heads, 4, servers=3)
    assert arguments[:3] == (str(TARGET), "--seed", "1")
    assert option_value(arguments, "--gpu-memory-utilization") == "0.300"
    assert json.loads(option_value(arguments, "--speculative-config") or "") == {
        "method": "vispec",
        "model": str(HEAD),
        "num_speculative_tokens": 4,
    }
    ngram = serve_arguments(replace(SETTINGS, sides=("ngram",)), "ngram", heads, 4, servers=3)
    assert option_value(ngram, "--worker-extension-cls") == EXTENSION
    own = replace(SETTINGS, serve_args=("--gpu_memory_utilization=0.4",))
    arguments = serve_arguments(own, "plain", heads, 4, servers=3)
    assert option_value(arguments, "--gpu-memory-utilization") == "0.4"
    assert option_value(arguments, "--speculative-config") is None
