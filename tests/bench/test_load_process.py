"""The child process that makes loads, with stand-ins for vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bench.fakes import SAMPLES
from vllm_vispec.bench.load import LoadError, LoadJob
from vllm_vispec.bench.load_process import LoadGenerator
from vllm_vispec.bench.load_worker import run
from vllm_vispec.compat.check import group_problem
from vllm_vispec.compat.groups import BENCH

CHILD = """
import json, os, sys, time
print(json.dumps({"status": 0}), flush=True)
for line in sys.stdin:
    arguments = json.loads(line)
    file = arguments[arguments.index("--result-dir") + 1] + "/load.json"
    temperature = float(arguments[arguments.index("--temperature") + 1])
    if temperature == 1:
        time.sleep(60)
    if temperature == 2:
        sys.exit("out of memory")
    print("temperature", temperature, file=sys.stderr, flush=True)
    number = int(arguments[arguments.index("--num-prompts") + 1])
    columns = dict(generated_texts="x", output_lens=3, input_lens=2, ttfts=0.1, latencies=0.3,
                   itls=[0.0, 0.1], errors="")
    content = {name: [value] * number for name, value in columns.items()}
    json.dump({**content, "duration": os.getpid()}, open(file, "w"))
    print(json.dumps({"status": int(temperature == 3)}), flush=True)
"""


@pytest.fixture
def child(tmp_path: Path) -> list[str]:
    file = tmp_path / "child.py"
    file.write_text(CHILD)
    return [str(file)]


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


def test_one_child_makes_all_loads(child: list[str], tmp_path: Path) -> None:
    with LoadGenerator(child) as generator:
        first, second = generator(job(tmp_path)), generator(job(tmp_path))
    assert len(first.requests) == len(SAMPLES)
    # The stand-in gives its process id as the duration.
    assert first.wall_s == second.wall_s


def test_a_failed_load_says_what_that_load_said(child: list[str], tmp_path: Path) -> None:
    with LoadGenerator(child) as generator:
        first = generator(job(tmp_path))
        with pytest.raises(LoadError) as error:
            generator(job(tmp_path, temperature=3))
        assert str(error.value) == "vllm bench serve ended with status 1: temperature 3.0"
        # It was no fault of the child, but the next load does not depend on that.
        assert len(generator(job(tmp_path)).requests) == len(first.requests)


def test_a_load_that_takes_too_long_is_killed(child: list[str], tmp_path: Path) -> None:
    with LoadGenerator(child) as generator:
        first = generator(job(tmp_path))
        begin = time.monotonic()
        with pytest.raises(LoadError, match="the load took longer than 1 s"):
            generator(job(tmp_path, temperature=1, timeout_s=1))
        assert time.monotonic() - begin < 30
        assert generator(job(tmp_path)).wall_s != first.wall_s


def test_a_child_that_dies_is_replaced(child: list[str], tmp_path: Path) -> None:
    with LoadGenerator(child) as generator:
        with pytest.raises(LoadError, match="ended with status 1: out of memory"):
            generator(job(tmp_path, temperature=2))
        assert generator(job(tmp_path)).requests


def test_a_child_that_never_gets_ready(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module")
    generator = LoadGenerator([str(broken)])
    with generator, pytest.raises(LoadError, match=r"(?s)does not start.*no_such_module"):
        generator(job(tmp_path))


PARENT = """
import sys, time
from vllm_vispec.bench.load_process import LoadGenerator
generator = LoadGenerator([sys.argv[1]])
generator.prepare()
print(generator._process.pid, flush=True)
time.sleep(60)
"""


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    file = tmp_path / "sleeper.py"
    file.write_text("import time; time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(file)], stdout=subprocess.PIPE)
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


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda: None, 0),
        (lambda: sys.exit(), 0),
        (lambda: sys.exit(2), 2),
        (lambda: sys.exit("bad option"), 1),
        (lambda: json.loads("{"), 1),
    ],
)
def test_status_of_a_command(
    end: object, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["unchanged"])
    assert run(end, ["bench", "serve"]) == status  # type: ignore[arg-type]
    assert sys.argv == ["vllm", "bench", "serve"]


def test_vllm_is_as_the_benchmark_expects() -> None:
    assert group_problem(BENCH) is None
