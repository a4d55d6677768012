"""`vispec bench profile` from settings to files, with made-up engines."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.bench.fakes import HEAD, SAMPLES, TARGET
from tests.bench.made_up_spans import DECODE, FakeEngine, K, Tape, prefill
from vllm_vispec.bench import profile as run
from vllm_vispec.bench.profile import (
    UNPAIRED,
    ProfileSettings,
    groups_of,
    measure,
    pair,
)
from vllm_vispec.bench.profile_engine import RUNNERS, EngineProcess
from vllm_vispec.bench.profile_result import Profile, print_profile
from vllm_vispec.bench.profile_steps import Steps
from vllm_vispec.cli.app import app
from vllm_vispec.utils.errors import ViSpecError

CLI = CliRunner()
INTERPRETED = RUNNERS["v2"].note_on_cpu
SETTINGS = ProfileSettings(
    str(TARGET), str(HEAD), "questions.jsonl", num_speculative_tokens=K, repetitions=2
)


class FakeProcess(FakeEngine):
    """A made-up engine that is started and ended."""

    def __enter__(self) -> FakeProcess:
        self.log.append(f"start {self.side}")
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append(f"end {self.side}")

    def answer(self, sample: Any) -> str:
        """No sample here asks for one."""
        raise AssertionError(sample)


@pytest.fixture
def world() -> tuple[run.Tools, dict[str, FakeProcess], list[str]]:
    """Tools with made-up engines, the engines by side, and what happened."""
    made: dict[str, FakeProcess] = {}
    events: list[str] = []

    def make(side: str, *_: object) -> Any:
        made[side] = FakeProcess(side, 5 if side == "eagle" else 3, log=events)
        return made[side]

    return run.Tools(make, dict, lambda _: None), made, events


def test_as_many_rounds_on_both_sides() -> None:
    eagle, vispec = Tape(), Tape()
    for tape, rounds in ((eagle, 4), (vispec, 2)):
        tape.step(prefill())
        for _ in range(rounds):
            tape.step(DECODE)
    vispec.step(prefill(50))
    found = pair(eagle.found(), vispec.found())
    assert [one.kind for one in found.eagle] == [one.kind for one in found.vispec]
    assert [one.kind for one in found.eagle] == ["decode", "decode", "prefill"]
    assert found.eagle[-1].prompt_tokens == 40


def test_sides_take_turns() -> None:
    log: list[str] = []
    sides = {side: FakeEngine(side, log=log) for side in ("vispec", "eagle")}
    sides["eagle"].decode_rounds = 5
    blocks, left_out = measure(sides, groups_of(SAMPLES[:2], 1), 2, lambda _: None)
    warm_up, first, second = log[:4], log[4:8], log[8:]
    assert warm_up == ["eagle", "vispec"] * 2
    assert first == ["eagle", "vispec", "vispec", "eagle"]
    assert second == ["vispec", "eagle", "eagle", "vispec"]
    assert sides["eagle"].asked == sides["vispec"].asked == [("s0",), ("s1",)] * 3
    assert len(blocks) == 4
    assert left_out["eagle"] == {UNPAIRED: 8}
    assert left_out["vispec"] == {}


def test_no_round_to_compare() -> None:
    class Silent(FakeEngine):
        def record(self, samples: Any) -> Steps:
            return Steps(left_out={"incomplete": 3})

    silent = {side: Silent(side) for side in ("eagle", "vispec")}
    with pytest.raises(ViSpecError, match=r"no decode step could be compared.*incomplete.*graphs"):
        measure(silent, [SAMPLES], 1, lambda _: None)


def test_files(world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tools, made, events = world
    profile = run.run_profile(SETTINGS, SAMPLES[:2], tmp_path / "out", tools)
    assert events[:2] == ["start eagle", "start vispec"]
    assert events[-2:] == ["end vispec", "end eagle"]
    folder = tmp_path / "out"
    stored = Profile.from_json(json.loads((folder / "profile.json").read_text()))
    assert stored == profile
    assert profile.rounds["decode"].rounds == 4 * 3
    assert profile.rounds["prefill"].rounds == 4
    assert [row.image_tokens for row in profile.prefill_by_image_tokens] == [10, 30]
    assert [row.summary.rounds for row in profile.prefill_by_image_tokens] == [2, 2]
    assert profile.rounds["prefill"].parts["draft_first_pass"].ratio == 0.2
    page = (folder / "profile.md").read_text()
    assert "| draft first pass | 40000.000 | 8000.000 | 0.200 | 0.200 to 0.200 | 0.200 |" in page
    assert "| 30 | 1 | 2 | 40000.000 | 8000.000 | 0.200 |" in page
    assert "| draft step 2 | 12000.000 | 12000.000 | 1.000 |" in page
    assert "![Stacked bars" in page
    assert "(profile.svg)" in page
    assert "8 without a counterpart" in page
    assert profile.command in page
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")
    svg = (folder / "profile.svg").read_bytes()
    assert svg.startswith(b"<?xml")
    print_profile(profile, Console(width=110))
    shown = capsys.readouterr().out
    assert "Prefill steps, medians over 4 on each side" in shown
    assert "vision adaptor" in shown
    run.run_profile(SETTINGS, SAMPLES[:2], tmp_path / "out", tools)
    assert (folder / "profile.svg").read_bytes() == svg
    assert sorted(made) == ["eagle", "vispec"]


def test_command_can_be_typed_again(
    tmp_path: Path, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools, _, _ = world
    file = tmp_path / "questions.jsonl"
    record = {"id": "s0", "family": "f", "messages": [{"role": "user", "content": "q"}]}
    file.write_text(json.dumps(record) + "\n")
    seen: list[ProfileSettings] = []
    original = run.run_profile

    def spy(settings: ProfileSettings, samples: Any, output: Path, _: Any) -> Profile:
        seen.append(settings)
        return original(settings, samples, output, tools)

    monkeypatch.setattr(run, "run_profile", spy)
    settings = ProfileSettings(
        str(TARGET),
        str(HEAD),
        str(file),
        num_speculative_tokens=K,
        limit=1,
        families=("f",),
        clock="cpu",
        serve="--dtype float32",
    )
    words = json_words(settings.command(tmp_path / "out"))
    for _ in range(2):
        result = CLI.invoke(app, words)
        assert result.exit_code == 0, result.output
        words = json_words(seen[-1].command(tmp_path / "out"))
    assert seen == [settings, settings]
    assert "wrote profile.json" in result.output


def json_words(command: str) -> list[str]:
    """The arguments of a command that begins with `vispec`."""
    return shlex.split(command)[1:]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"runner": "v9"}, "--runner v9 is unknown"),
        ({"clock": "sun"}, "--clock sun is unknown: choose from wall, cpu"),
        ({"concurrency": "0"}, "--concurrency 0: give at least 1"),
        ({"repetitions": "0"}, "--repetitions 0: give at least 1"),
        ({"num-speculative-tokens": "0"}, "-k 0: give 1 to 32"),
        ({"image-tokens": "-3"}, "--image-tokens -3: give native, 0 or more"),
        ({"image-tokens": "many"}, "--image-tokens many: give values separated by commas"),
        ({"dataset": "none"}, "dataset none is unknown"),
        ({"serve": "--dtype 'float"}, "--serve --dtype 'float: No closing quotation"),
        ({"speculative-config": "[1"}, "--speculative-config [1 is no JSON object"),
    ],
)
def test_bad_options(options: dict[str, str], said: str, tmp_path: Path) -> None:
    given = {"target": str(TARGET), "head": str(HEAD), "data": "d", "output": str(tmp_path)}
    words = [word for name, value in (given | options).items() for word in (f"--{name}", value)]
    result = CLI.invoke(app, ["bench", "profile", *words])
    assert result.exit_code == 1
    assert said in result.output


def test_jobs_make_a_head_of_equal_size(tmp_path: Path) -> None:
    found = run.jobs(SETTINGS, tmp_path)
    assert found["vispec"].speculative_config == {
        "method": "vispec",
        "model": str(HEAD),
        "num_speculative_tokens": K,
    }
    assert found["eagle"].speculative_config["method"] == "eagle"
    made = json.loads(Path(found["eagle"].speculative_config["model"], "config.json").read_text())
    ours = json.loads((HEAD / "config.json").read_text())
    same = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    assert {name: made[name] for name in same} == {name: ours[name] for name in same}
    draft = replace(SETTINGS, speculative_config='{"image_table_size": 8}')
    again = run.jobs(draft, tmp_path)
    assert again["eagle"] == found["eagle"]
    assert again["vispec"].speculative_config["image_table_size"] == 8
    assert found["eagle"].environment()["VLLM_USE_V2_MODEL_RUNNER"] == "0"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; print('oh no', file=sys.stderr)", "engine of eagle ended: oh no"),
        ("""print('{"error": "no such head"}')""", "no such head (engine of eagle, log "),
    ],
)
def test_an_engine_that_does_not_start(
    program: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen: Callable[..., Any] = subprocess.Popen

    def start(_: list[str], **options: Any) -> Any:
        return popen([sys.executable, "-c", program], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    job = run.jobs(SETTINGS, tmp_path)["eagle"]
    with (
        pytest.raises(ViSpecError) as error,
        EngineProcess("eagle", job, tmp_path / "log"),
    ):
        pass
    assert said in str(error.value)
