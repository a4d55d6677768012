"""`vispec doctor` asks vLLM itself which runner it will use."""

from __future__ import annotations

import pytest

from vllm_vispec.cli.doctor import runner_line


def test_runner_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert runner_line() == "V1 (VLLM_USE_V2_MODEL_RUNNER=0)"


def test_runner_that_vllm_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", False)
    assert runner_line() == (
        "none: vLLM's default configuration fails here (VLLM_USE_V2_MODEL_RUNNER=1): "
        "Model Runner V2 requires Triton."
    )


def test_runner_by_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    assert runner_line() in ("V1 (default of this platform)", "V2 (default of this platform)")
