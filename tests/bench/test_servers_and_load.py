"""Servers, the load generator and its child process, and what workers are asked."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module, reload
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.bench.fakes import SAMPLES, SETTINGS, lines
from vllm_vispec.bench.load import (
    LoadGenerator,
    LoadJob,
    LoadResult,
    chat_messages,
    make_load,
    read_result,
)
from vllm_vispec.bench.questions import AskTarget, QuestionStore
from vllm_vispec.bench.runner import digest
from vllm_vispec.bench.schema import BenchSample, MemoryFacts, SpecCounters
from vllm_vispec.bench.server import EXTENSION, IMAGE_TABLE, BenchServer, choose_ports
from vllm_vispec.data.types import Part, Turn
from vllm_vispec.spec_decode.image_table import TableStats
from vllm_vispec.utils.errors import ViSpecError


def server_of(folder: Path, *arguments: str) -> BenchServer:
    return BenchServer("plain", arguments, choose_ports(1)[0], folder / "log.txt")


def test_earlier_questions_are_answered_when_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Turn("user", (Part("and?"),))
    samples = [replace(SAMPLES[0], sample_id=f"s{number}", turns=(ask, ask)) for number in range(5)]
    asked: list[str] = []

    def ask_server(url: str, model: str) -> AskTarget:
        return lambda sample: asked.append(sample.sample_id) or f"{url} said so"  # type: ignore[func-returns-value]

    monkeypatch.setattr("vllm_vispec.bench.questions.ask_server", ask_server)
    server = server_of(tmp_path)
    store = QuestionStore(SETTINGS, samples, tmp_path)
    first, _ = store.questions(-1, server, 2)
    assert asked == ["s0", "s1"]
    more, file = QuestionStore(SETTINGS, samples, tmp_path).questions(-1, server, 4)
    assert asked == ["s0", "s1", "s2", "s3"]
    assert more[:2] == first
    assert [turn.role for turn in more[3].turns] == ["user", "assistant", "user"]
    assert len(lines(file)) == 4
    assert store.questions(-1, server, 1)[0] == first[:1]


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
    _, file = QuestionStore(SETTINGS, [sample], tmp_path).questions(-1, server_of(tmp_path), 1)
    assert lines(file) == [{"prompt": [message]}]
    assert digest([sample]) != digest([replace(sample, max_tokens=9)])
    with pytest.raises(ViSpecError, match=r"sample s: .*nothing\.png does not exist"):
        chat_messages(replace(sample, turns=(Turn("user", (Part(image="/nothing.png"),)),)))


RESULT = {
    "duration": 2.5,
    "generated_texts": ["a b c", ""],
    "output_lens": [3, 0],
    "input_lens": [7, 1],
    "ttfts": [0.1234567, 0.0],
    "latencies": [0.5, 0.0],
    "itls": [[0.0001, 0.2, 0.1765433], []],
    "errors": ["", "Traceback:\n  file\nTimeoutError: late\n"],
}
"""What `vllm bench serve` writes for two requests, the second of which failed."""
ACCEPTED = (67, 31, 7)
DRAFTED = {
    "spec_decode_num_drafts": 97,
    "spec_decode_draft_tokens": 291,
    "spec_decode_accepted_tokens": 105,
    "spec_decode_per_position_acceptance_rates": [count / 97 for count in ACCEPTED],
}


def read(file: Path, content: object) -> LoadResult:
    file.write_text(json.dumps(content))
    return read_result(file, SAMPLES[:2])


def test_result_of_the_load(tmp_path: Path) -> None:
    result = read(tmp_path / "r.json", RESULT)
    good, bad = result.requests
    assert (result.wall_s, result.spec) == (2.5, None)
    assert (good.sample_id, good.output_text, good.output_tokens) == ("s0", "a b c", 3)
    assert (good.ttft_s, good.itl_s) == (0.123457, (0.2, 0.176543))
    assert (good.error, bad.error, bad.output_tokens) == (None, "TimeoutError: late", 0)
    # vLLM gives shares of the steps; the counts behind them come back whole.
    drafted = read(tmp_path / "r.json", RESULT | DRAFTED)
    assert drafted.spec == SpecCounters(97, 291, 105, ACCEPTED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"errors": [""]}, "the result of vllm bench serve cannot be read"),
        ({"duration": "x"}, "the result of vllm bench serve cannot be read"),
        ({"errors": ["Bad Request", "late"]}, "no request was answered: Bad Request"),
    ],
)
def test_a_result_that_is_not_whole(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ViSpecError, match=message):
        read(tmp_path / "r.json", RESULT | change)


METRICS = """\
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",num_gpu_blocks="309"} 1.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 10.0
"""


def test_memory_of_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(url: str, body: bytes | None = None) -> str:
        assert body is None or json.loads(body) == {"method": IMAGE_TABLE}
        return METRICS if body is None else '{"results": [null, {"hits": 7, "misses": 2}]}'

    monkeypatch.setattr("vllm_vispec.bench.server.call", call)
    server = server_of(tmp_path)
    assert server.memory() == MemoryFacts(kv_blocks=309)
    server.arguments = ("--worker-extension-cls", EXTENSION)
    assert server.memory() == MemoryFacts(None, 309, 7, 2)


def test_ports() -> None:
    assert len(set(choose_ports(3))) == 3
    first = choose_ports(1)[0]
    assert choose_ports(1, first) == (first,)


def test_a_process_that_ends_is_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_vispec.bench.server.CLI", ("-c", "print('no such model')"))
    server = server_of(tmp_path, "target")
    server.start()
    with pytest.raises(ViSpecError, match=r"server of plain ended: no such model.*log\.txt"):
        server.wait_until_ready(60)
    server.stop()


def test_stopping_ends_children_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = f"{sys.executable} -c 'import time; time.sleep(600)'"
    pids = tmp_path / "pids"
    code = f"import subprocess as s; p = s.Popen({child!r}, shell=True, start_new_session=False);"
    code += f"open({str(pids)!r}, 'w').write(str(p.pid)); p.wait()"
    monkeypatch.setattr("vllm_vispec.bench.server.CLI", ("-c", code))
    server = server_of(tmp_path)
    server.start()
    wait_until(lambda: pids.exists() and pids.read_text() != "")
    server.stop()
    wait_until(lambda: not _is_there(int(pids.read_text())))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


CHILD = """
import json, os, sys, time
for line in sys.stdin:
    arguments = json.loads(line)["arguments"]
    file = arguments[arguments.index("--result-dir") + 1] + "/load.json"
    temperature = float(arguments[arguments.index("--temperature") + 1])
    if temperature == 1:
        time.sleep(60)
    if temperature == 2:
        sys.exit("out of memory")
    number = int(arguments[arguments.index("--num-prompts") + 1])
    columns = dict(generated_texts="x", output_lens=3, input_lens=2, ttfts=0.1, latencies=0.3,
                   itls=[0.0, 0.1], errors="")
    content = {name: [value] * number for name, value in columns.items()}
    json.dump({**content, "duration": os.getpid()}, open(file, "w"))
    print("{}", flush=True)
"""


@pytest.fixture(autouse=True)
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the module that the child runs."""
    monkeypatch.setattr("vllm_vispec.bench.load.WORKER", "stand_in_for_loads")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    file = tmp_path / "stand_in_for_loads.py"
    file.write_text(CHILD)
    return file


def job(tmp_path: Path, temperature: float = 0.0, timeout_s: float = 30.0) -> LoadJob:
    return LoadJob(
        url="http://x",
        model="m",
        samples=SAMPLES,
        questions=tmp_path / "q.jsonl",
        concurrency=1,
        temperature=temperature,
        result=tmp_path / "load.json",
        timeout_s=timeout_s,
    )


def test_one_child_makes_all_loads(tmp_path: Path) -> None:
    with LoadGenerator() as generator:
        first, second = generator(job(tmp_path)), generator(job(tmp_path))
    assert len(first.requests) == len(SAMPLES)
    # The stand-in gives its process id as the duration.
    assert first.wall_s == second.wall_s
    assert not _is_there(int(first.wall_s))


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (1, "vllm bench serve did not reply within 1 s"),
        (2, r"^vllm bench serve ended: out of memory \(log: .*load\.log\)$"),
    ],
)
def test_a_load_that_fails_is_ended_and_the_next_has_a_new_child(
    tmp_path: Path, temperature: float, message: str
) -> None:
    with LoadGenerator() as generator:
        first = generator(job(tmp_path))
        begin = time.monotonic()
        with pytest.raises(ViSpecError, match=message):
            generator(job(tmp_path, temperature, timeout_s=1 if temperature == 1 else 30))
        assert time.monotonic() - begin < 30
        assert not _is_there(int(first.wall_s))
        assert generator(job(tmp_path)).wall_s != first.wall_s


PARENT = """
import os, sys, time
from pathlib import Path
from vllm_vispec.utils.process import ChildProcess
child = ChildProcess(["-c", "import time; time.sleep(60)"], os.environ, Path(sys.argv[1]))
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_child_ends_with_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    command = [sys.executable, "-c", PARENT, str(tmp_path / "log.txt")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    wait_until(lambda: not _is_there(child))


def _is_there(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    # Whoever inherits it may not have asked for its status yet.
    return state != "Z"


def test_the_command_is_run_in_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr("vllm.benchmarks.serve.main", called.append)
    assert make_load({"arguments": job(tmp_path).arguments()}) == {}
    (given,) = called
    assert (given.base_url, given.max_concurrency, given.save_detailed) == ("http://x", 1, True)


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """vLLM's rejection sampler; what a test does to it is undone."""
    from vllm.v1.sample import rejection_sampler

    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", lambda *_: None)
    return rejection_sampler


STATS = TableStats(hits=7, computed=2, misses=1, evicted=1)
DRAFT = SimpleNamespace(draft_rows=SimpleNamespace(table=SimpleNamespace(stats=STATS)))


@pytest.mark.parametrize(
    ("runner", "found"),
    [
        ({"drafter": DRAFT}, {"hits": 7, "misses": 3}),
        ({"speculator": DRAFT}, {"hits": 7, "misses": 3}),
        ({}, None),
        ({"drafter": SimpleNamespace()}, None),
        ({"speculator": None}, None),
    ],
)
def test_image_lookups(sampler: ModuleType, runner: dict[str, Any], found: object) -> None:
    """Both runners have a table; other drafts have none."""
    module, _, name = EXTENSION.rpartition(".")
    worker = getattr(import_module(module), name)()
    worker.model_runner = SimpleNamespace(**runner)
    assert getattr(worker, IMAGE_TABLE)() == found


@pytest.mark.parametrize("is_cpu", [True, False])
def test_sampling_is_repaired_on_a_cpu(
    sampler: ModuleType, is_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own EAGLE and n-gram get what our engine gives itself; a GPU needs nothing."""
    from vllm.platforms import current_platform

    module = import_module(EXTENSION.rpartition(".")[0])
    # The import in this process, if it was the first, has repaired the sampler already.
    monkeypatch.setattr(sampler, "expand_batch_to_tokens", faulty := lambda *_: None)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: is_cpu)
    reload(module)
    if not is_cpu:
        assert sampler.expand_batch_to_tokens is faulty
        return
    counts = torch.tensor([2, 3])
    repeated = sampler.expand_batch_to_tokens(torch.tensor([0.5, 0.7]), counts, 3)
    assert repeated.tolist() == pytest.approx([0.5, 0.5, 0.7])
