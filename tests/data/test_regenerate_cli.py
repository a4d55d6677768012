"""The `regenerate` command: options, messages, exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.data.fakes import FakeBackend, changed
from vllm_vispec.cli.regenerate import regenerate
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.regenerate import job
from vllm_vispec.data.regenerate.dialogue import Answer, Dialogue
from vllm_vispec.data.regenerate.settings import RegenerateSettings, write_questions
from vllm_vispec.data.types import Conversation
from vllm_vispec.utils.errors import ViSpecError

RUNNER = CliRunner()


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(regenerate)
    return app


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    fake = FakeBackend()
    monkeypatch.setattr(job.regenerate_all, "__defaults__", ("offline", fake.make, False))
    return fake


def arguments(settings: RegenerateSettings, *more: str) -> list[str]:
    options = {"--input": settings.input, "--output": settings.output, "--target": "some/target"}
    return [*(str(item) for pair in options.items() for item in pair), *more]


def test_summary(app: typer.Typer, backend: FakeBackend, settings: RegenerateSettings) -> None:
    result = RUNNER.invoke(app, arguments(settings, "--temperature", "0", "--seed", "5"))
    assert result.exit_code == 0, result.output
    assert "9 samples: 6 regenerated, 0 there before, 3 rejected" in result.output
    assert "rejected: 1 x does not exist" in result.output
    assert f"{settings.output}.rejected.jsonl" in result.output
    assert "6 samples could not be checked" in result.output
    meta = json.loads(Path(f"{settings.output}.meta.json").read_text())
    assert (meta["temperature"], meta["seed"], meta["max_tokens"]) == (0.0, 5, 1024)
    again = RUNNER.invoke(app, arguments(settings, "--temperature", "0", "--seed", "5"))
    assert "9 samples: 0 regenerated, 6 there before, 3 rejected" in again.output


def test_answers_that_repeat_themselves(
    app: typer.Typer, backend: FakeBackend, settings: RegenerateSettings
) -> None:
    prose = Path(job.__file__).read_text()[:1000]  # anything that a person wrote

    def speak(dialogue: Dialogue) -> Answer:
        is_stuck = dialogue.source.sample_id == "s2" and not dialogue.answers
        return Answer(prose + "a red ball and " * 80 * is_stuck, "stop")

    backend.speak = speak
    result = RUNNER.invoke(app, arguments(settings))
    assert "warning: 1 answers repeat themselves" in result.output
    assert "  s2: ...a red ball and" in result.output


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--prompt-style", "loud"], "--prompt-style is 'loud'"),
        (["--engine", "[]"], "--engine is not a JSON object"),
        (["--engine", "{"], "--engine is not JSON"),
        (["--server", "http://x", "--ray"], "--server and --ray exclude each other"),
    ],
)
def test_user_errors_are_one_line(
    app: typer.Typer,
    backend: FakeBackend,
    settings: RegenerateSettings,
    more: list[str],
    named: str,
) -> None:
    result = RUNNER.invoke(app, arguments(settings, *more))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"vispec: {named}")
    assert result.stderr.count("\n") == 1


@pytest.fixture
def album(pictures: Path, tmp_path: Path) -> Path:
    """Two images in two levels, and a file that is none."""
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    shutil.copy(pictures / "a.png", folder / "a.png")
    shutil.copy(pictures / "b.png", folder / "sub" / "b.PNG")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_questions_about_every_image(album: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "answers.jsonl"
    settings = RegenerateSettings(input=album, output=output, target="some/target")
    file = write_questions(settings, ["One?", "Two?"])
    assert file == output.with_name("answers.jsonl.questions.jsonl")
    found = [item for item in read_conversations(file) if isinstance(item, Conversation)]
    assert [item.sample_id for item in found] == ["a.png", "sub/b.PNG"]
    assert [item.turns[0].parts[1].text for item in found] == ["One?", "Two?"]
    before = file.read_text()
    write_questions(settings, ["One?", "Two?"])
    shutil.copy(album / "a.png", album / "new.png")
    with pytest.raises(ViSpecError, match="choose another --output"):
        write_questions(settings, ["One?", "Two?"])
    assert file.read_text() == before
    with pytest.raises(ViSpecError, match="has no image"):
        write_questions(changed(settings, input=tmp_path / "out"))


def test_a_folder_as_input(
    app: typer.Typer, backend: FakeBackend, album: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    options = ["--target", "some/target", "--output", str(output), "--question", "What is it?"]
    done = RUNNER.invoke(app, ["--input", str(album), *options])
    assert done.exit_code == 0, done.output
    assert "2 samples: 2 regenerated" in done.output
    found = [json.loads(line) for line in output.read_text().splitlines()]
    texts = {record["messages"][0]["content"][1]["text"] for record in found}
    assert texts == {"What is it?\nAnswer at length, with at least 1000 words."}
    refused = RUNNER.invoke(app, ["--input", str(output), *options])
    assert refused.exit_code == 1
    assert "--question is for a folder of images" in refused.output


def test_a_job_that_answers_nothing_leaves_no_questions(
    app: typer.Typer, backend: FakeBackend, album: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    questions = output.with_name("answers.jsonl.questions.jsonl")
    options = ["--input", str(album), "--target", "some/target", "--output", str(output)]
    backend.refuses = True
    assert RUNNER.invoke(app, options).exit_code == 1
    assert not questions.exists()
    backend.refuses = False
    assert RUNNER.invoke(app, options).exit_code == 0
    backend.refuses = True
    shutil.copy(album / "a.png", album / "new.png")
    refused = RUNNER.invoke(app, options)
    assert "choose another --output" in refused.output
    assert questions.exists()
