"""Installed and unused, the plugin changes nothing; plain EAGLE heads stay vLLM's own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine import eagle_pair
from tests.support.child import run_in_subprocess
from tests.support.runners import RUNNERS
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

KIND = "qwen2_5_vl"
WRAPPED = [
    "vllm.config.vllm.VllmConfig.num_lookahead_tokens",
    "vllm.engine.arg_utils.EngineArgs.create_engine_config",
    "vllm.engine.arg_utils.EngineArgs.create_speculative_config",
    "vllm.engine.arg_utils.maybe_override_with_speculators",
    "vllm.v1.worker.worker_base.WorkerBase.__init__",
]
OPTIONS = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64}


def _serve(runs: list[dict[str, Any]], plugins: str) -> list[dict[str, Any]]:
    env = RUNNERS["v1"].env() | {"VLLM_PLUGINS": plugins}
    return run_in_subprocess("tests.engine.unused_jobs:serve", {"kind": KIND, "runs": runs}, env)


@pytest.fixture(scope="module")
def served(tiny: TinyStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A plain engine without and with the plugin; a text-only target with a plain EAGLE head."""
    folder = tmp_path_factory.mktemp("eagle")
    eagle_pair.build(tiny.target(eagle_pair.KIND), folder / "target", folder / "head")
    plain = OPTIONS | {"model": str(tiny.target(KIND))}
    text = OPTIONS | {"model": str(folder / "target")}
    eagle = text | {"draft": str(folder / "head"), "method": "eagle"}
    (without,) = _serve([plain], "none")
    names = ("with", "text", "eagle")
    return {"without": without} | dict(
        zip(names, _serve([plain, text, eagle], "vispec"), strict=True)
    )


def test_loading_wraps_five_functions_and_adds_three_architectures() -> None:
    """Every attribute of every loaded vLLM module and class is the same object as before."""
    (found,) = run_in_subprocess("tests.engine.unused_jobs:register_twice", env=RUNNERS["v1"].env())
    assert found["added"] == [
        "EagleDraftVlmForCausalLM",
        "EagleViSpecEmbedsForCausalLM",
        "EagleViSpecForCausalLM",
    ]
    assert found["parsers_same"]
    assert found["first"] == WRAPPED
    assert found["second"] == []


def test_plain_engine_is_the_same_with_and_without(served: dict[str, dict[str, Any]]) -> None:
    assert served["with"]["outputs"] == served["without"]["outputs"]
    assert served["with"]["wrapped"] == [True, True]
    assert served["without"]["wrapped"] == [False, False]
    for name in ("with", "without"):
        assert not served[name]["own_new"]
        assert served[name]["engine_modules"] == []


def test_plain_eagle_head_is_not_touched(served: dict[str, dict[str, Any]]) -> None:
    eagle, text = served["eagle"], served["text"]
    assert eagle["drafter"] == "EagleProposer"
    assert not eagle["own_new"]
    assert eagle["engine_modules"] == []
    ids = [
        {name: items[0]["token_ids"] for name, items in run["outputs"].items()}
        for run in (eagle, text)
    ]
    assert ids[0] == ids[1]
    rounds = [n for items in eagle["outputs"].values() for n in items[0]["accepted_draft"]]
    assert sum(rounds) > 0
