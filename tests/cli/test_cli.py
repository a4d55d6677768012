"""The `vispec` command."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.heads import write_config, write_head
from vllm_vispec.cli import doctor
from vllm_vispec.cli.app import app
from vllm_vispec.compat import check
from vllm_vispec.compat.groups import GROUPS, unique_points
from vllm_vispec.compat.source import read_module
from vllm_vispec.heads.card import guess_target, serve_command
from vllm_vispec.heads.folder import inspect_head
from vllm_vispec.heads.speculators import Serving

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing vLLM takes seconds; `test_doctor_runner` does it."""
    monkeypatch.setattr(doctor, "runner_line", lambda: "V1 (stub)")
    monkeypatch.setattr(doctor, "tree_line", lambda: "heads (stub)")


def test_convert(tmp_path: Path) -> None:
    write_head(tmp_path / "in")
    arguments = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--dtype", "float16"]
    result = RUNNER.invoke(app, [*arguments, "--target", "my/target"])
    assert result.exit_code == 0, result.output
    assert "serve it with: vllm serve my/target" in result.output
    assert inspect_head(tmp_path / "out").dtype == "F16"
    again = RUNNER.invoke(app, arguments)
    assert again.exit_code == 1
    assert again.stderr.startswith("vispec: destination")
    assert again.stderr.count("\n") == 1


def test_doctor_prints_everything(tmp_path: Path) -> None:
    write_head(tmp_path, "automodel")
    result = RUNNER.invoke(app, ["doctor", "--head", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for expected in (
        "vllm-vispec",
        "transformers",
        "tested: 0.32 to 0.33",
        "V1 (stub)",
        "automodel: NeMo Automodel",
        "3 (2 rows per image)",
        f'"model":"{tmp_path}"',
    ):
        assert expected in result.output
    lines = result.output.splitlines()
    assert f"patch points   all {len(unique_points())} in vLLM fit" in lines
    assert GROUPS[0].title not in result.output
    verbose = RUNNER.invoke(app, ["doctor", "--verbose"]).output
    assert "heads (stub)" in verbose
    for group in GROUPS:
        assert f"  ok   {group.title}: " in verbose
        for point in group.points:
            assert f"       ok   {point.name}: {point.reason}" in verbose


@pytest.mark.parametrize(
    ("gone", "code", "lines"),
    [
        (
            "vllm.engine.arg_utils",
            1,
            (
                "  FAIL core: ",
                "       FAIL vllm.engine.arg_utils:EngineArgs.create_speculative_config: module",
                "ViSpec is disabled here. ViSpec: patch point vllm.engine.arg_utils",
            ),
        ),
        (
            "vllm.v1.worker.gpu_model_runner",
            0,
            (
                "  ok   core: ",
                "  ok   chains on V2: ",
                "  FAIL chains on V1: ",
                "       FAIL vllm.v1.worker.gpu_model_runner:GPUModelRunner{self.encoder_cache, ",
                "not available here: ViSpec on the V1 model runner: patch point ",
                "not available here: draft trees on the V1 model runner: patch point ",
            ),
        ),
        ("vllm.v1.", 1, ("  FAIL chains on V2: ", "  FAIL chains on V1: ")),
    ],
)
def test_doctor_says_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, gone: str, code: int, lines: tuple[str, ...]
) -> None:
    monkeypatch.setattr(
        check, "read_module", lambda m: None if m.startswith(gone) else read_module(m)
    )
    result = RUNNER.invoke(app, ["doctor"])
    assert result.exit_code == code
    for line in lines:
        assert any(found.startswith(line) for found in result.output.splitlines()), line


@pytest.mark.parametrize(
    ("version", "code", "text"),
    [("0.31.2", 1, "refused"), ("0.33.1", 0, "(supported"), ("0.34.0", 0, "newer than tested")],
)
def test_doctor_judges_the_version(
    monkeypatch: pytest.MonkeyPatch, version: str, code: int, text: str
) -> None:
    monkeypatch.setattr("vllm_vispec.compat.check.installed_version", lambda: version)
    result = RUNNER.invoke(app, ["doctor"])
    assert result.exit_code == code
    assert text in result.output


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "yes, head and target go together"),
        ({"hidden_size": 48}, "hidden_size of the head is 32 .* is 48: use the head that"),
        ({"vocab_size": 65}, "vocab_size of the head is 64 .* is 65: use the head that"),
        ({"model_type": "qwen2_vl"}, "the target is qwen2_vl: use the head that"),
    ],
)
def test_doctor_says_whether_head_and_target_fit(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    write_head(tmp_path / "head")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    text = sizes | {"num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 48}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "target").mkdir()
    kind = {"model_type": changes.get("model_type", "qwen2_5_vl"), "vision_config": {}}
    write_config(tmp_path / "target", kind | {"text_config": text | changes})
    options = ["--head", str(tmp_path / "head"), "--target", str(tmp_path / "target")]
    result = RUNNER.invoke(app, ["doctor", *options])
    if changes:
        assert result.exit_code == 1
        assert re.search(said, result.stderr)
        assert result.stderr.count("\n") == 1
    else:
        assert result.exit_code == 0
        assert said in result.stdout
        assert "up to 4 (1, 2, 4)" in result.stdout
        # Its row of docs/targets.md, and what to use.
        assert "family         Qwen2.5-VL: 3B, 7B, 32B, 72B" in result.stdout
        assert "recommended    a draft that vLLM serves by itself" in result.stdout


@pytest.mark.parametrize(
    ("option", "said"), [("--target", "--target '{0}' cannot be read"), ("--head", "config.json")]
)
def test_doctor_with_a_folder_of_something_else(tmp_path: Path, option: str, said: str) -> None:
    result = RUNNER.invoke(app, ["doctor", option, str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"vispec: {said.format(tmp_path)}")
    assert result.stderr.count("\n") == 1
    # It stands before what is true of this environment.
    assert result.output.startswith(result.stderr)
    assert "patch points" in result.stdout


def test_known_targets(tmp_path: Path) -> None:
    write_head(tmp_path, hidden_size=64, num_attention_heads=4, head_dim=16)
    assert guess_target(inspect_head(tmp_path).config) == "TARGET"
    assert serve_command("H", Serving("T", 3)) == (
        "vllm serve T --speculative-config "
        '\'{"method":"vispec","model":"H","num_speculative_tokens":3}\''
    )
