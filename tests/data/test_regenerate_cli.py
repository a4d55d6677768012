"""The `regenerate` command: options, messages, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.data.fakes import FakeBackend
from vllm_vispec.cli.regenerate import regenerate
from vllm_vispec.data.regenerate import job
from vllm_vispec.data.regenerate.settings import RegenerateSettings
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


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--prompt-style", "loud"], "--prompt-style is 'loud'"),
        (["--temperature", "-1"], "--temperature is -1.0"),
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


def test_unknown_backend(settings: RegenerateSettings) -> None:
    with pytest.raises(ViSpecError, match="backend cloud: choose one of offline, server, ray"):
        job.regenerate_all(settings, "cloud")
