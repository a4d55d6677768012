"""Running a matrix, with stand-ins for servers and load."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.fakes import HEAD, SAMPLES, SETTINGS, TARGET, World, answer, lines
from vllm_vispec.bench.checks import check_inputs
from vllm_vispec.bench.follow_up import with_answers
from vllm_vispec.bench.load import (
    LoadError,
    LoadJob,
    LoadResult,
    chat_messages,
    read_result,
    write_questions,
)
from vllm_vispec.bench.runner import digest, interruptible, run_matrix
from vllm_vispec.bench.schema import BenchRun, BenchSample, CellResult, SpecCounters
from vllm_vispec.bench.server import (
    BenchServer,
    ServerError,
    ServerSpec,
    choose_ports,
    difference,
    option_value,
    parse_counters,
    parse_kv_blocks,
)
from vllm_vispec.bench.serving import serve_arguments
from vllm_vispec.bench.sides import Heads
from vllm_vispec.conversations.types import Part, Turn
from vllm_vispec.errors import ViSpecError

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
    assert BenchRun.of_this_format(json.loads(json.dumps(run.to_json()))) == run


def test_every_number_of_draft_tokens_has_its_own_servers(tmp_path: Path) -> None:
    world = World()
    settings = replace(SETTINGS, num_speculative_tokens=(2, 5))
    run_matrix(settings, SAMPLES, tmp_path, tools=world.tools())
    ends = [event for event in world.events if event.split()[0] in ("start", "stop")]
    one = ["start plain", "start vispec", "stop vispec", "stop plain"]
    assert ends == one * 2


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


def test_a_side_that_does_not_start_fails_alone(tmp_path: Path) -> None:
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
    monkeypatch.setattr("vllm_vispec.bench.serving.has_gpu", lambda: True)
    arguments = serve_arguments(SETTINGS, "vispec", heads, 4, servers=3)
    assert arguments[:3] == (str(TARGET), "--seed", "1")
    assert option_value(arguments, "--gpu-memory-utilization") == "0.300"
    assert json.loads(option_value(arguments, "--speculative-config") or "") == {
        "method": "vispec",
        "model": str(HEAD),
        "num_speculative_tokens": 4,
    }
    own = replace(SETTINGS, serve_args=("--gpu_memory_utilization=0.4",))
    arguments = serve_arguments(own, "plain", heads, 4, servers=3)
    assert option_value(arguments, "--gpu-memory-utilization") == "0.4"
    assert option_value(arguments, "--speculative-config") is None


def test_earlier_questions_are_answered_once() -> None:
    questions = [Turn("user", (Part(text),)) for text in ("one?", "two?", "three?")]
    given = Turn("assistant", (Part("given"),))
    sample = BenchSample("s", "f", (questions[0], given, questions[1], questions[2]), 8)
    assert sample.follow_up
    asked: list[int] = []

    def ask(partial: BenchSample) -> str:
        asked.append(len(partial.turns))
        return "own"

    (whole,) = with_answers([sample], ask)
    texts = [turn.text for turn in whole.turns]
    assert texts == ["one?", "given", "two?", "own", "three?"]
    assert asked == [3]
    assert with_answers([whole], ask) == (whole,)


def test_questions_for_the_load(tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(picture)
    turns = (Turn("user", (Part(image=str(picture)), Part("What?"))),)
    sample = BenchSample("s", "f", turns, 8)
    (message,) = chat_messages(sample)
    first, second = message["content"]
    assert first["image_url"]["url"].startswith("data:image/png;base64,")
    assert second == {"type": "text", "text": "What?"}
    write_questions([sample, *SAMPLES], tmp_path / "q.jsonl")
    assert [set(record) for record in lines(tmp_path / "q.jsonl")] == [{"prompt"}] * 4
    assert digest([sample]) != digest([replace(sample, max_tokens=9)])
    with pytest.raises(ViSpecError, match=r"sample s: .*nothing\.png does not exist"):
        chat_messages(replace(sample, turns=(Turn("user", (Part(image="/nothing.png"),)),)))


def test_command_of_the_load(tmp_path: Path) -> None:
    samples = (SAMPLES[0], replace(SAMPLES[1], max_tokens=20))
    job = LoadJob("http://h:1", "m", samples, tmp_path / "q.jsonl", 4, 1.0, tmp_path / "r.json")
    arguments = job.arguments()
    assert option_value(arguments, "--num-prompts") == "2"
    assert option_value(arguments, "--temperature") == "1"
    assert json.loads(option_value(arguments, "--extra-body") or "") == {
        "max_completion_tokens": 20,
        "skip_special_tokens": False,
    }
    assert "--ignore-eos" not in arguments


def result_of(**change: object) -> dict[str, object]:
    """What `vllm bench serve` writes for two requests, the second of which failed."""
    return {
        "duration": 2.5,
        "generated_texts": ["a b c", ""],
        "output_lens": [3, 0],
        "input_lens": [7, 1],
        "ttfts": [0.1234567, 0.0],
        "latencies": [0.5, 0.0],
        "itls": [[0.0001, 0.2, 0.1765433], []],
        "errors": ["", "Traceback:\n  file\nTimeoutError: late\n"],
    } | change


def test_result_of_the_load(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps(result_of()))
    result = read_result(file, SAMPLES[:2])
    good, bad = result.requests
    assert result.wall_s == 2.5
    assert (good.sample_id, good.output_text, good.output_tokens) == ("s0", "a b c", 3)
    assert (good.ttft_s, good.itl_s) == (0.123457, (0.2, 0.176543))
    assert (bad.output_tokens, bad.error) == (0, "TimeoutError: late")
    with pytest.raises(LoadError, match="cannot be read"):
        read_result(file, SAMPLES)
    with pytest.raises(LoadError, match="cannot be read"):
        read_result(tmp_path / "nothing.json", SAMPLES)


METRICS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 2.0
# TYPE vllm:spec_decode_num_drafts_created gauge
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.76e+09
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 24.0
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 11.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 8.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 3.0
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",num_gpu_blocks="309"} 1.0
"""


def test_counters() -> None:
    found = parse_counters(METRICS)
    assert found == SpecCounters(12, 24, 11, (8, 3))
    assert difference(found, SpecCounters(2, 4, 1, (1, 0))) == SpecCounters(10, 20, 10, (7, 3))
    assert parse_kv_blocks(METRICS) == 309
    assert parse_counters("") is None
    assert parse_kv_blocks("") is None


def test_ports() -> None:
    assert len(set(choose_ports(3))) == 3
    first = choose_ports(1)[0]
    assert choose_ports(1, first) == (first,)


def test_a_process_that_ends_is_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_vispec.bench.server.CLI", ("-c", "print('no such model')"))
    spec = ServerSpec("plain", ("target",), choose_ports(1)[0], tmp_path / "log.txt")
    with (
        BenchServer(spec) as server,
        pytest.raises(ServerError, match=r"(?s)server of plain ended: no such model.*log\.txt"),
    ):
        server.wait_until_ready(60)


def test_stopping_ends_children_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = f"{sys.executable} -c 'import time; time.sleep(600)'"
    pids = tmp_path / "pids"
    code = f"import subprocess as s; p = s.Popen({child!r}, shell=True, start_new_session=False);"
    code += f"open({str(pids)!r}, 'w').write(str(p.pid)); p.wait()"
    monkeypatch.setattr("vllm_vispec.bench.server.CLI", ("-c", code))
    spec = ServerSpec("plain", (), choose_ports(1)[0], tmp_path / "log.txt")
    with BenchServer(spec):
        deadline = time.monotonic() + 60
        while not (pids.exists() and pids.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        pid = pids.read_text()
    ps = ["ps", "-o", "stat=", "-p", pid]
    # Gone, or a zombie that its new parent has not yet collected.
    assert subprocess.run(ps, capture_output=True, text=True).stdout.strip()[:1] in ("", "Z")


def test_sigterm_becomes_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_damaged_record() -> None:
    with pytest.raises(ViSpecError, match=r"CellResult: .*: Field required"):
        CellResult.from_json({"repetition": 0})
