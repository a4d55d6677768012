"""`vispec bench run` and `vispec bench quick`: options, messages, exit codes, floors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.bench.fakes import HEAD, SAMPLES, SETTINGS, TARGET, World, answer
from vllm_vispec.bench import runner
from vllm_vispec.bench.load import LoadJob, LoadResult
from vllm_vispec.bench.matrix import MatrixSettings
from vllm_vispec.bench.quick import Floors, judge
from vllm_vispec.bench.runner import Outcome, run_matrix
from vllm_vispec.bench.schema import BenchRun, BenchSample
from vllm_vispec.cli.app import app
from vllm_vispec.utils.errors import ViSpecError

CLI = CliRunner()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Stand-ins for everything that the commands start."""
    world = World()

    def run(
        settings: MatrixSettings, samples: Sequence[BenchSample], output: Path, *_: Any
    ) -> Outcome:
        return run_matrix(settings, samples, output, tools=world.tools())

    monkeypatch.setattr(runner, "run_matrix", run)
    return world


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    records = [
        {"id": f"s{i}", "family": f"f{i % 2}", "messages": [{"role": "user", "content": f"q {i}"}]}
        for i in range(4)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def arguments(command: str, data: Path, output: Path, **more: str) -> list[str]:
    options = {"target": str(TARGET), "head": str(HEAD), "data": str(data), "output": str(output)}
    options |= more
    return ["bench", command, *(x for name in options for x in (f"--{name}", options[name]))]


def test_run(world: World, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    more = {"concurrency": "1,2", "image-tokens": "native", "families": "f0", "max-tokens": "5"}
    given = arguments("run", data, output, sides="plain,vispec,ngram", repetitions="2", **more)
    result = CLI.invoke(app, given)
    assert result.exit_code == 0, result.output
    assert "dataset openai: 2 samples (f0 2)" in result.output
    assert "12 cells measured, 0 failed, 0 were there" in result.output
    cells = BenchRun.load(output).cells
    assert {cell.key.side for cell in cells} == {"plain", "vispec", "ngram"}
    assert {cell.key.image_tokens for cell in cells} == {-1}
    assert '"max_completion_tokens": 5' in cells[0].command
    again = CLI.invoke(app, given)
    assert "0 cells measured, 0 failed, 12 were there" in again.output


def test_warning_if_samples_are_few(world: World, data: Path, tmp_path: Path) -> None:
    given = arguments("run", data, tmp_path / "out", concurrency="8", repetitions="1")
    result = CLI.invoke(app, given)
    assert result.exit_code == 0
    assert "4 samples cannot keep 8 requests in flight" in result.output


def test_failed_cells_show_in_the_exit_code(world: World, data: Path, tmp_path: Path) -> None:
    world.broken = {"vispec"}
    result = CLI.invoke(app, arguments("run", data, tmp_path / "out", repetitions="1"))
    assert result.exit_code == 1
    assert "failed: server of vispec ended" in "\n".join([result.output, *world.events])
    assert "1 cells measured, 1 failed" in result.output


def test_interrupted(world: World, data: Path, tmp_path: Path) -> None:
    def interrupt(job: LoadJob) -> None:
        raise KeyboardInterrupt

    world.on_load = interrupt
    result = CLI.invoke(app, arguments("run", data, tmp_path / "out"))
    assert result.exit_code == 130
    assert "stopped: the same command goes on from here" in result.output
    assert not world.up()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sides": "plain,medusa"}, "--sides: medusa is unknown"),
        ({"sides": "eagle"}, "eagle needs --eagle-head"),
        ({"concurrency": "1,x"}, "--concurrency 1,x: give values separated by commas"),
        ({"image-tokens": "many"}, "--image-tokens many"),
        ({"dataset": "mnist"}, "dataset mnist is unknown"),
        ({"families": "f9"}, "family f9 has no usable sample"),
        ({"image-tokens": "64"}, "no sample of the dataset has an image"),
        ({"data": "nowhere.jsonl"}, r"nowhere\.jsonl is no file"),
    ],
)
def test_refused(
    world: World, data: Path, tmp_path: Path, more: dict[str, str], message: str
) -> None:
    data = Path(more.pop("data", data))
    result = CLI.invoke(app, arguments("run", data, tmp_path / "out", **more))
    assert result.exit_code == 1
    with pytest.raises(ViSpecError, match=message):
        raise ViSpecError(result.output)
    assert world.events == []


def test_quick_passes(world: World, data: Path, tmp_path: Path) -> None:
    world.accepted = 3
    result = CLI.invoke(app, arguments("quick", data, tmp_path / "out", dataset="openai"))
    assert result.exit_code == 0
    assert "FAIL" not in result.output
    assert "ok   vispec, concurrency 1: identical_outputs 1.000, floor 1" in result.output
    assert "ok   vispec, concurrency 4: tokens_per_round 4.000, floor 3.5" in result.output


def test_quick_fails_if_acceptance_falls(world: World, data: Path, tmp_path: Path) -> None:
    world.accepted = 2
    result = CLI.invoke(app, arguments("quick", data, tmp_path / "out", dataset="openai"))
    assert result.exit_code == 1
    assert "FAIL vispec, concurrency 4: tokens_per_round 3.000, floor 3.5" in result.output
    assert "ok   vispec, concurrency 1: identical_outputs 1.000, floor 1" in result.output


def test_quick_fails_if_one_answer_differs(world: World, data: Path, tmp_path: Path) -> None:
    world.accepted = 3
    world.answers = lambda side, sample: (
        "another answer" if (side, sample.sample_id) == ("vispec", "s1") else "the answer"
    )
    result = CLI.invoke(app, arguments("quick", data, tmp_path / "out", dataset="openai"))
    assert result.exit_code == 1
    assert "FAIL vispec, concurrency 1: identical_outputs 0.750, floor 1" in result.output
    assert "ok   vispec, concurrency 1: tokens_per_round 4.000, floor 3.5" in result.output


def test_floors(tmp_path: Path) -> None:
    world = World()
    run_matrix(SETTINGS, SAMPLES, tmp_path, tools=world.tools())
    run = BenchRun.load(tmp_path)
    findings = judge(run, SETTINGS, Floors(tokens_per_round=2.0))
    assert len(findings) == 4
    assert all(finding.ok for finding in findings)
    assert not all(finding.ok for finding in judge(run, SETTINGS, Floors(tokens_per_round=2.1)))
    missing = judge(replace(run, cells=()), SETTINGS, Floors())
    assert {(finding.value, finding.ok) for finding in missing} == {(None, False)}
    assert str(missing[0]) == "FAIL plain, concurrency 1: answered not measured, floor 1"


def test_other_answers_miss_the_floor(tmp_path: Path) -> None:
    world = World()

    def load(job: LoadJob) -> LoadResult:
        requests = [answer(sample) for sample in job.samples]
        if world.servers[job.url].side == "vispec":
            requests[1] = replace(requests[1], output_text="another answer")
            requests[2] = answer(job.samples[2], "late")
        return LoadResult(tuple(requests), 0.5)

    run_matrix(SETTINGS, SAMPLES, tmp_path, tools=replace(world.tools(), make_load=load))
    missed = [
        (finding.name, finding.value)
        for finding in judge(BenchRun.load(tmp_path), SETTINGS, Floors(tokens_per_round=0))
        if not finding.ok
    ]
    assert [name for name, _ in missed] == ["answered", "identical_outputs", "tokens_per_round"]
    assert missed[1][1] == pytest.approx(1 / 3)
