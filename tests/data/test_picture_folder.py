"""A folder of images as input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.data.fakes import FakeBackend
from vllm_vispec.cli.regenerate import regenerate
from vllm_vispec.data.read import read_conversations
from vllm_vispec.data.regenerate import job
from vllm_vispec.data.regenerate.picture_folder import write_questions
from vllm_vispec.data.types import Conversation
from vllm_vispec.utils.errors import ViSpecError


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
    file = write_questions(album, tmp_path / "out" / "answers.jsonl", ["One?", "Two?"])
    found = [item for item in read_conversations(file) if isinstance(item, Conversation)]
    assert [item.sample_id for item in found] == ["a.png", "sub/b.PNG"]
    assert [item.turns[0].parts[1].text for item in found] == ["One?", "Two?"]
    assert all((file.parent / item.images[0]).is_file() for item in found)


def test_the_same_folder_goes_on_and_a_changed_one_is_refused(album: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    first = write_questions(album, output).read_text()
    assert write_questions(album, output).read_text() == first
    shutil.copy(album / "a.png", album / "new.png")
    with pytest.raises(ViSpecError, match="choose another --output"):
        write_questions(album, output)
    assert (tmp_path / "answers.jsonl.questions.jsonl").read_text() == first


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(ViSpecError, match="has no image"):
        write_questions(tmp_path, tmp_path / "answers.jsonl")


def test_command(album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeBackend()
    monkeypatch.setattr(job.regenerate_all, "__defaults__", ("offline", fake.make, False))
    app = typer.Typer()
    app.command()(regenerate)
    output = tmp_path / "answers.jsonl"
    options = ["--target", "some/target", "--output", str(output), "--question", "What is it?"]
    done = CliRunner().invoke(app, ["--input", str(album), *options])
    assert done.exit_code == 0, done.output
    assert "2 samples: 2 regenerated" in done.output
    texts = {line["messages"][0]["content"][1]["text"] for line in _lines(output)}
    assert texts == {"What is it?\nAnswer at length, with at least 1000 words."}
    refused = CliRunner().invoke(app, ["--input", str(output), *options])
    assert refused.exit_code == 1
    assert "--question is for a folder of images" in refused.output


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]
