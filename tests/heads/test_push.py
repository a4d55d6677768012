"""`vispec push`: what a hub gets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner, Result

from tests.heads.test_export import export, make_target
from vllm_vispec.cli.app import app


class FakeHub:
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.private: bool | None = None

    def create_repo(self, repo: str, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        if repo.startswith("other/"):
            raise PermissionError("403 Forbidden\nyou are not a member")
        self.private = private

    def create_commit(self, repo: str, operations: Any, commit_message: str) -> Any:
        for one in operations:
            content = one.path_or_fileobj
            is_bytes = isinstance(content, bytes)
            self.files[one.path_in_repo] = content if is_bytes else Path(content).read_bytes()
        return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    found = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    return found


def push(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def test_a_hub_gets_the_head_and_its_card(hub: FakeHub, tmp_path: Path) -> None:
    head = export(tmp_path / "head", "org/target")
    (head / "notes.txt").write_text("mine")
    done = push(head, "me/head", "--private")
    assert done.output == f"pushed {head}: https://hub/me/head/commit/1\n"
    assert hub.private
    assert set(hub.files) == {"README.md", "config.json", "model.safetensors", "provenance.json"}
    for name in ("config.json", "model.safetensors"):
        assert hub.files[name] == (head / name).read_bytes()
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: vllm\nbase_model: org/target\n")
    assert "    vllm serve me/head\n" in card
    assert str(tmp_path) not in card


def test_what_is_not_pushed(hub: FakeHub, tmp_path: Path) -> None:
    head = export(tmp_path / "head", "org/target")
    local = export(tmp_path / "local", str(make_target(tmp_path / "target")))
    model = make_target(tmp_path / "model")
    refused = {
        (local, "me/head"): "vispec convert",
        (head, "head"): "is no hub id",
        (model, "me/head"): f"send other models by `hf upload me/head {model}`",
        (tmp_path / "none", "me/head"): "does not exist",
        (head, "other/head"): "the hub does not take other/head (403 Forbidden)",
    }
    for arguments, message in refused.items():
        done = push(*arguments)
        assert (done.exit_code, hub.files) == (1, {})
        assert message in done.output
