"""`vispec bench profile` from settings to files, with made-up engines."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.bench.fakes import HEAD, SAMPLES, TARGET
from tests.bench.made_up_spans import DECODE, FakeEngine, K, Tape, prefill
from tests.support.tiny_store import TinyStore
from vllm_vispec.bench import profile as run
from vllm_vispec.bench.profile import ProfileSettings, measure, pair
from vllm_vispec.bench.profile_engine import EngineProcess
from vllm_vispec.bench.profile_steps import Steps
from vllm_vispec.cli.app import app
from vllm_vispec.utils.errors import ViSpecError

CLI = CliRunner()
SETTINGS = ProfileSettings(
    target=str(TARGET),
    head=str(HEAD),
    data="questions.jsonl",
    num_speculative_tokens=K,
    repetitions=2,
)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to the made-up engines that stand in for real ones."""
    events: list[str] = []

    def make(side: str, *_: object) -> FakeEngine:
        return FakeEngine(side, 5 if side == "eagle" else 3, log=events)

    monkeypatch.setattr(run, "EngineProcess", make)
    return events


def test_as_many_steps_on_both_sides() -> None:
    eagle, vispec = Tape(), Tape()
    for tape, steps in ((eagle, 4), (vispec, 2)):
        tape.step(prefill())
        for _ in range(steps):
            tape.step(DECODE)
    vispec.step(prefill(50))
    found = pair(eagle.found(), vispec.found())
    assert [one.kind for one, _ in found] == ["decode", "decode", "prefill"]
    assert [one.kind for _, one in found] == ["decode", "decode", "prefill"]
    assert found[-1][1].prompt_tokens == 40


def test_no_step_to_compare() -> None:
    silent: Any = SimpleNamespace(record=lambda _: Steps(left_out={"incomplete": 3}))
    with pytest.raises(ViSpecError, match=r"no decode step could be compared.*incomplete.*graphs"):
        measure({"eagle": silent, "vispec": silent}, [SAMPLES], 1)


def test_files(events: list[str], tmp_path: Path) -> None:
    profile = run.run_profile(SETTINGS, SAMPLES[:2], tmp_path)
    # A warm-up, then turns: who goes first alternates between questions and repetitions.
    eagle, vispec = ([f"{side} s0", f"{side} s1"] for side in ("eagle", "vispec"))
    first, second = [eagle[0], vispec[0]], [eagle[1], vispec[1]]
    turns = [*first, *second, *first, *second[::-1], *first[::-1], *second]
    assert events == ["start eagle", "start vispec", *turns, "end vispec", "end eagle"]
    assert profile["left_out"] == {"eagle": {"without a counterpart": 8}, "vispec": {}}
    assert json.loads((tmp_path / "profile.json").read_text()) == json.loads(json.dumps(profile))
    assert (profile["decode"]["steps"], profile["prefill"]["steps"]) == (4 * 3, 4)
    rows = profile["prefill_by_image_tokens"]
    assert [(row["image_tokens"], row["requests"], row["steps"]) for row in rows] == [
        (10, 1, 2),
        (30, 1, 2),
    ]
    page = (tmp_path / "profile.md").read_text()
    for said in (
        "| draft first pass | 40000.000 | 8000.000 | 0.200 | 0.200 to 0.200 | 0.200 |",
        "| 30 | 1 | 2 | 40000.000 | 8000.000 | 0.200 |",
        "| draft step 2 | 12000.000 | 12000.000 | 1.000 |",
        "Prefill steps, medians over 4 of each engine",
        "- Steps left out, eagle: 8 without a counterpart\n\n## Conditions",
        "(profile.svg)",
    ):
        assert said in page
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "profile.svg").read_bytes()
    assert svg.startswith(b"<?xml")
    run.run_profile(SETTINGS, SAMPLES[:2], tmp_path)
    assert (tmp_path / "profile.svg").read_bytes() == svg


def test_from_the_command_line(
    tmp_path: Path, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "questions.jsonl"
    record = {"id": "s0", "family": "f", "messages": [{"role": "user", "content": "q"}]}
    file.write_text(json.dumps(record) + "\n")
    words = [*("bench", "profile", "--target", str(TARGET), "--head", str(HEAD), "-k", str(K))]
    words += ["--data", str(file), "--limit", "1", "--families", "f", "--clock", "cpu"]
    words += ["--serve", "--dtype float32", "--speculative-config", '{"draft_vocab": 5}']
    words += ["--repetitions", "2", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vispec", *words])
    result = CLI.invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "wrote profile.json" in result.output
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    settings = SETTINGS.replace(
        data=str(file),
        limit=1,
        families=("f",),
        clock="cpu",
        serve_args=("--dtype", "float32"),
        speculative_config={"draft_vocab": 5},
    )
    assert found["settings"] == json.loads(json.dumps(settings.model_dump(mode="json")))
    assert shlex.split(found["command"]) == ["vispec", *words]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"runner": "v9"}, "--runner is 'v9': use one of v1, v2"),
        ({"clock": "sun"}, "--clock is 'sun': use one of wall, cpu"),
        ({"concurrency": "0"}, "--concurrency is 0: give more than 0"),
        ({"repetitions": "0"}, "--repetitions is 0: give more than 0"),
        ({"num-speculative-tokens": "0"}, "--num-speculative-tokens is 0: give at least 1"),
        ({"image-tokens": "-3"}, "--image-tokens is '-3': give at least -1"),
        ({"image-tokens": "many"}, "--image-tokens is 'many': give a whole number"),
        ({"image-tokens": ""}, "--image-tokens is []: give at least one value"),
        ({"dataset": "none"}, "dataset none is unknown"),
        ({"serve": "--dtype 'float"}, "--serve --dtype 'float: No closing quotation"),
        ({"speculative-config": "[1"}, "--speculative-config is not JSON"),
    ],
)
def test_bad_options(options: dict[str, str], said: str, tmp_path: Path) -> None:
    given = {"target": str(TARGET), "head": str(HEAD), "data": "d", "output": str(tmp_path)}
    words = [word for name, value in (given | options).items() for word in (f"--{name}", value)]
    result = CLI.invoke(app, ["bench", "profile", *words])
    assert result.exit_code == 1
    assert said in result.output


def test_jobs_make_a_head_of_equal_size(tmp_path: Path) -> None:
    draft = SETTINGS.replace(speculative_config={"image_table_size": 8})
    found = run.jobs(draft, tmp_path)
    assert found["vispec"].speculative_config == {
        "method": "vispec",
        "model": str(HEAD),
        "num_speculative_tokens": K,
        "image_table_size": 8,
        "adaptive": False,
    }
    eagle = found["eagle"].speculative_config
    made = json.loads(Path(eagle.pop("model"), "config.json").read_text())
    assert eagle == {"method": "eagle", "num_speculative_tokens": K}
    ours = json.loads((HEAD / "config.json").read_text())
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        assert made[name] == ours[name]
    assert found["eagle"].environment()["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_beside_a_published_model_stands_a_head_of_the_targets_width(
    tiny: TinyStore, tmp_path: Path
) -> None:
    found = run.jobs(SETTINGS.replace(target=str(tiny.target()), head=tiny.sibling()), tmp_path)
    assert found["vispec"].speculative_config["model"] == tiny.sibling()
    made = Path(found["eagle"].speculative_config["model"])
    target = json.loads((tiny.target() / "config.json").read_text())["text_config"]
    assert json.loads((made / "config.json").read_text())["hidden_size"] == target["hidden_size"]
    assert {"fc.weight", "layers.0.mlp.up_proj.weight"} <= {*load_file(made / "model.safetensors")}


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("echo oh no >&2", "engine of eagle ended: oh no"),
        ("""echo '{"error": "no such head"}'""", "no such head (engine of eagle, log "),
    ],
)
def test_an_engine_that_does_not_start(
    program: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    job = run.jobs(SETTINGS, tmp_path)["eagle"]
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ViSpecError, match=re.escape(said)):
        EngineProcess("eagle", job, tmp_path / "log").__enter__()
