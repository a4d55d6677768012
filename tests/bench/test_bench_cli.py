"""`vispec bench run` and `vispec bench quick`: options, messages, exit codes, floors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.bench.fakes import HEAD, SAMPLES, SETTINGS, TARGET, World
from vllm_vispec.bench.load import LoadJob
from vllm_vispec.bench.quick import judge
from vllm_vispec.bench.runner import run_matrix
from vllm_vispec.bench.schema import BenchRun
from vllm_vispec.cli.app import app
from vllm_vispec.utils.errors import ViSpecError

CLI = CliRunner()


def arguments(command: str, data: Path, output: Path, **more: str) -> list[str]:
    options = {"target": str(TARGET), "head": str(HEAD), "data": str(data), "output": str(output)}
    options |= more
    return ["bench", command, *(x for name in options for x in (f"--{name}", options[name]))]


def test_run(world: World, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    more = {"concurrency": "1,2", "image-tokens": "native", "families": "f0", "max-tokens": "5"}
    given = arguments("run", data, output, variants="plain,vispec,ngram", repetitions="2", **more)
    result = CLI.invoke(app, given)
    assert result.exit_code == 0, result.output
    assert "dataset openai: 2 samples (f0 2)" in result.output
    assert "12 cells measured, 0 failed, 0 were there" in result.output
    cells = BenchRun.load(output).cells
    assert {cell.key.variant for cell in cells} == {"plain", "vispec", "ngram"}
    assert {cell.key.image_tokens for cell in cells} == {-1}
    assert '"max_completion_tokens": 5' in cells[0].command
    again = CLI.invoke(app, given)
    assert "0 cells measured, 0 failed, 12 were there" in again.output


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
        ({"variants": "plain,medusa"}, "--variants: medusa is unknown"),
        ({"sides": "plain"}, "--sides is now --variants: use --variants plain"),
        ({"concurrency": "1,x"}, "--concurrency is 'x': give a whole number"),
        ({"image-tokens": "many"}, "--image-tokens is 'many'"),
        ({"dataset": "mnist"}, "dataset mnist is unknown"),
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


def test_quick_fails_if_one_answer_differs(world: World, data: Path, tmp_path: Path) -> None:
    world.accepted = 3
    world.answers = lambda variant, sample: (
        "another answer" if (variant, sample.sample_id) == ("vispec", "s1") else "the answer"
    )
    result = CLI.invoke(app, arguments("quick", data, tmp_path / "out", dataset="openai"))
    assert result.exit_code == 1
    assert "FAIL vispec, concurrency 1: identical_outputs 0.750, floor 1" in result.output
    assert "ok   vispec, concurrency 1: acceptance_length 4.000, floor 3.5" in result.output


def test_a_missing_cell_reaches_no_floor(tmp_path: Path) -> None:
    run_matrix(SETTINGS, SAMPLES, tmp_path, tools=World(accepted=3).tools())
    run = BenchRun.load(tmp_path)
    assert [ok for ok, _ in judge(run, SETTINGS)] == [True] * 4
    missing = list(judge(replace(run, cells=()), SETTINGS))
    assert not any(ok for ok, _ in missing)
    assert missing[0][1] == "FAIL plain, concurrency 1: answered not measured, floor 1"
