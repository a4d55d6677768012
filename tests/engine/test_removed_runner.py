"""A vLLM without one of its model runners serves heads with the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.child import run_in_subprocess
from tests.support.runners import RUNNERS
from tests.support.tiny_heads import HeadSpec
from tests.support.tiny_store import TinyStore
from tests.support.vllm_without import without_v1_runner, without_v2_runner

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

KIND = "qwen2_5_vl"
TREE = {"tree": {"depth": 3, "top_k": 2}, "num_draft_tokens": 6}


def _serve(tiny: TinyStore, vllm: Path, runner: str, gone: list[str]) -> dict[str, dict[str, Any]]:
    options = {
        "model": str(tiny.target(KIND)),
        "draft": str(tiny.head(HeadSpec(KIND))),
        "num_draft_tokens": 3,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
    }
    arguments = {"kind": KIND, "options": options, "trees": [TREE], "gone": gone}
    env = RUNNERS[runner].env() | {"PYTHONPATH": str(vllm)}
    items = run_in_subprocess("tests.engine.removed_runner_jobs:serve", arguments, env)
    return {item["name"]: item for item in items}


def _check(served: dict[str, dict[str, Any]], drafters: tuple[str, str], other: str) -> None:
    for name, drafter in zip(("chain", "tree 1"), drafters, strict=True):
        assert served[name]["drafter"] == drafter
        results = {run: _tokens(served[run]) for run in ("plain", name)}
        assert results[name] == results["plain"]
        accepted = [n for items in served[name]["outputs"].values() for n in _accepted(items)]
        assert sum(accepted) > 0
    refused = served["other"]
    assert refused["error"] == "ViSpecError", refused["message"]
    assert refused["message"].startswith(
        f"ViSpec on the {other} model runner: patch point vllm.v1."
    )
    assert "use the other model runner (VLLM_USE_V2_MODEL_RUNNER=" in refused["message"]


def _tokens(run: dict[str, Any]) -> dict[str, list[int]]:
    return {name: items[0]["token_ids"] for name, items in run["outputs"].items()}


def _accepted(items: list[dict[str, Any]]) -> list[int]:
    return list(items[0]["accepted_draft"])


@pytest.mark.v2
def test_v2_without_the_v1_runner(tiny: TinyStore, tmp_path: Path) -> None:
    """Neither `gpu_model_runner.py` nor V1's proposers are there, nor imported by us."""
    gone = ["vllm.v1.worker.gpu_model_runner", "vllm.v1.spec_decode.eagle"]
    served = _serve(tiny, without_v1_runner(tmp_path), "v2", gone)
    _check(served, ("ViSpecSpeculator", "TreeSpeculator"), "V1")


@pytest.mark.slow
def test_v1_without_the_v2_runner(tiny: TinyStore, tmp_path: Path) -> None:
    gone = ["vllm.v1.worker.gpu.model_runner", "vllm.v1.worker.gpu.spec_decode.speculator"]
    served = _serve(tiny, without_v2_runner(tmp_path), "v1", gone)
    _check(served, ("ViSpecProposer", "TreeProposer"), "V2")
