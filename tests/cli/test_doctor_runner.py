"""`vispec doctor` asks vLLM itself which runner and which attention backend it will use."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from vllm_vispec.cli.doctor import runner_line, tree_line


def test_runner_that_vllm_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", False)
    assert runner_line() == (
        "none: the V2 model runner needs Triton, which does not serve this machine "
        "(VLLM_USE_V2_MODEL_RUNNER=1)"
    )


@pytest.mark.parametrize("stated", [None, "0", "1"])
def test_runner_is_the_one_that_vllm_takes(
    monkeypatch: pytest.MonkeyPatch, stated: str | None
) -> None:
    """Doctor does not build vLLM's configuration, which takes seconds, but comes to the same."""
    from vllm.config import VllmConfig

    if stated is None:
        monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    else:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", stated)
    for module in ("vllm.triton_utils", "vllm.config.vllm"):
        monkeypatch.setattr(f"{module}.HAS_TRITON", True)
    assert runner_line().startswith("V2 " if VllmConfig().use_v2_model_runner else "V1 ")


def test_doctor_imports_little_of_vllm() -> None:
    """It answers in a few seconds, most of them `import torch` and `import vllm`."""
    script = (
        "import sys; from vllm_vispec.cli.doctor import run_checks; run_checks();"
        "print(*sys.modules)"
    )
    command = [sys.executable, "-c", script]
    imported = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    assert "vllm.triton_utils" in imported
    assert not {"vllm.config", "vllm.engine.arg_utils", "transformers"} & set(imported)


@pytest.mark.parametrize(("options", "status"), [([], 0), (["--head", "nowhere"], 1)])
def test_doctor_leaves_without_tidying_up(options: list[str], status: int) -> None:
    """Nothing of the answer is lost, and the status is the command's."""
    command = [sys.executable, "-m", "vllm_vispec", "doctor", *options]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode == status
    assert done.stdout.startswith("vllm-vispec")
    assert "patch points   all " in done.stdout
    assert len(done.stderr.splitlines()) == status


def test_heads_of_trees_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 and 20 channels more, as far as the backend at hand serves sizes: the CPU's 160."""
    found = r"heads of 128 are padded to (152|160|256) at the default depth \(\w+\)"
    assert re.fullmatch(found, tree_line())
    nothing = "vllm_vispec.models.padded_heads.BackendFinder.find"
    monkeypatch.setattr(nothing, lambda *_: None)
    assert tree_line() == "refused: no attention backend here serves heads of 128 + 20"
