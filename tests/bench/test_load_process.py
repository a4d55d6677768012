"""The child process that makes loads, with stand-ins for vLLM."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.bench.fakes import SAMPLES
from vllm_vispec.bench.load import LoadError, LoadGenerator, LoadJob, make_load

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


def test_a_load_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    with LoadGenerator() as generator:
        first = generator(job(tmp_path))
        begin = time.monotonic()
        with pytest.raises(LoadError, match="vllm bench serve did not reply within 1 s"):
            generator(job(tmp_path, temperature=1, timeout_s=1))
        assert time.monotonic() - begin < 30
        assert not _is_there(int(first.wall_s))
        assert generator(job(tmp_path)).wall_s != first.wall_s


def test_a_failed_load_says_why_and_the_next_has_a_new_child(tmp_path: Path) -> None:
    with LoadGenerator() as generator:
        first = generator(job(tmp_path))
        message = r"^vllm bench serve ended: out of memory \(log: .*load\.log\)$"
        with pytest.raises(LoadError, match=message):
            generator(job(tmp_path, temperature=2))
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
    deadline = time.monotonic() + 30
    while _is_there(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)


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
