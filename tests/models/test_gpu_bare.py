"""Rehearses on a CPU what `tests.gpu.bare` asks of a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.gpu import bare_attention, bare_trees
from tests.gpu.bare import PARTS
from tests.gpu.setup import TREE, Setup
from tests.support.child import REPOSITORY
from tests.support.runners import overlay_folder
from vllm_vispec.trees.settings import TreeSettings

CPU = Setup("cpu", None)
NEEDS_CUDA = {"attention_fa3", "attention_fa3_fp8", "tree_memory"}


def _vllm_folder() -> str:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    return spec.submodule_search_locations[0]


def _run(output: Path, *arguments: str) -> dict[str, Any]:
    """Run the command; its report."""
    command = [sys.executable, "-m", "tests.gpu.bare", "--output", str(output), *arguments]
    more = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | more, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts: dict[str, Any] = json.loads(output.read_text())["parts"]
    return parts


def test_its_tree_is_the_default() -> None:
    default = TreeSettings()
    assert vars(TREE) == {name: getattr(default, name) for name in vars(TREE)}


def test_every_part_runs_without_vllm(tmp_path: Path) -> None:
    parts = _run(tmp_path / "gpu.json", "--device", "cpu", "--vllm", _vllm_folder())
    states = {name: part["state"] for name, part in parts.items()}
    assert states == {name: "not run" if name in NEEDS_CUDA else "passed" for name in PARTS}, parts


@pytest.mark.overlay
def test_the_triton_kernel_of_the_next_release(tmp_path: Path) -> None:
    folder = str(Path(overlay_folder(), "vllm"))
    only = ("--only", "attention_triton", "--device", "cpu")
    (part,) = _run(tmp_path / "gpu.json", *only, "--vllm", folder).values()
    assert part["state"] == "passed", part


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--only", "tree_step"), "no CUDA device"),
        (("--only", "attention_triton", "--device", "cpu"), "--vllm FOLDER"),
    ],
)
def test_a_part_says_what_it_lacks(tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    (part,) = _run(tmp_path / "gpu.json", *arguments).values()
    assert part["state"] == "not run"
    assert reason in part["reason"]


@pytest.mark.parametrize(
    ("padding", "error", "message"), [(0.0, 0.01, "masked 64 to 72"), (1.0, 0.0, "padding")]
)
def test_a_wrong_kernel_fails(padding: float, error: float, message: str) -> None:
    def attend(batch: bare_attention.Batch) -> torch.Tensor:
        output = torch.full_like(batch.query, padding)
        output[..., : batch.shape.head_size] = batch.expected + error
        return output

    with pytest.raises(AssertionError, match=message):
        bare_attention._check_all(CPU, attend)


def test_a_wrong_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = bare_trees.step, iter(range(1_000_000))

    def step(*args: Any) -> bare_trees.Outputs:
        outputs = right(*args)
        # Every other call is the expectation's.
        return outputs._replace(accepted=outputs.accepted + next(calls) % 2)

    monkeypatch.setattr(bare_trees, "step", step)
    monkeypatch.setattr(bare_trees, "_is_stable", lambda *args: True)
    with pytest.raises(AssertionError, match="step 0"):
        bare_trees.run_step(CPU)


def test_flash_attention_is_called_as_its_interface_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own interface, with the compiled operator replaced by one that reads its arguments."""
    path = Path(_vllm_folder(), "vllm_flash_attn", "flash_attn_interface.py")
    spec = importlib.util.spec_from_file_location("flash_attn_interface", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    math: Callable[..., Any] = bare_attention._sdpa(torch.nn.attention.SDPBackend.MATH)
    calls = 0

    def fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any) -> Any:
        nonlocal calls
        calls += 1
        starts, lengths, table = others[4], others[8], others[11]
        scale, causal = others[20], others[21]
        assert causal is True
        shape = bare_attention.Shape(
            len(lengths), int(starts[1]), int(lengths[0]), q.shape[1], k.shape[2], 64, q.shape[2]
        )
        batch = bare_attention.Batch(shape, q, torch.cat((k, v), -1), table, torch.empty(0))
        assert scale == batch.scale
        return math(batch), None, None, None

    monkeypatch.setattr(torch.ops, "_vllm_fa3_C", SimpleNamespace(fwd=fwd), raising=False)
    monkeypatch.setattr(bare_attention, "load_flash_attention", lambda setup: module)
    found = bare_attention.run_fa3(CPU)
    assert list(found) == ["0 splits", "32 splits"]
    assert calls == 6
