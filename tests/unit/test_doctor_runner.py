"""`vispec doctor` asks vLLM itself which runner and which attention backend it will use."""

from __future__ import annotations

import re

import pytest

from vllm_vispec.cli.doctor import runner_line, tree_line


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


def test_heads_of_trees_here() -> None:
    """128 and 20 channels more, as far as the backend at hand serves sizes: the CPU's 160."""
    found = r"heads of 128 are padded to (152|160|256) at the default depth \(\w+\)"
    assert re.fullmatch(found, tree_line())


def test_heads_that_no_backend_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = "vllm_vispec.engine.padded_heads.BackendFinder.find"
    monkeypatch.setattr(nothing, lambda *_: None)
    assert tree_line() == "refused: no attention backend here serves heads of 128 + 20"
