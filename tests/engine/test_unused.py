"""Installed and unused, the plugin changes nothing; plain EAGLE heads stay vLLM's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine import eagle_pair
from tests.support.child import run_in_subprocess
from tests.support.runners import RUNNERS
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

KIND = "qwen2_5_vl"
WRAPPED = [
    "vllm.engine.arg_utils.EngineArgs.create_speculative_config",
    "vllm.v1.worker.worker_base.WorkerBase.__init__",
]
OPTIONS = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64}


def _serve(options: dict[str, Any], plugins: str, **kwargs: Any) -> list[Any]:
    env = RUNNERS["v1"].env() | {"VLLM_PLUGINS": plugins}
    kwargs = {"kind": KIND, "options": options} | kwargs
    return run_in_subprocess("tests.engine.unused_jobs:serve", kwargs, env)


def test_loading_wraps_two_functions_and_adds_one_architecture() -> None:
    """Every attribute of every loaded vLLM module and class is the same object as before."""
    (found,) = run_in_subprocess("tests.engine.unused_jobs:register_twice", env=RUNNERS["v1"].env())
    assert found["added"] == ["EagleViSpecForCausalLM"]
    assert found["parsers_same"]
    assert found["first"] == WRAPPED
    assert found["second"] == []


def test_plain_engine_is_the_same_with_and_without(tiny: TinyStore) -> None:
    options = OPTIONS | {"model": str(tiny.target(KIND))}
    (with_looks, with_outputs), (without_looks, without_outputs) = (
        _serve(options, plugins) for plugins in ("vispec", "none")
    )
    assert with_outputs == without_outputs
    assert with_looks["wrapped"] == [True, True]
    assert without_looks["wrapped"] == [False, False]
    for looks in (with_looks, without_looks):
        assert not looks["own_new"]
        assert looks["engine_modules"] == []


@pytest.fixture(scope="module")
def text_pair(tiny: TinyStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text-only target and a plain EAGLE head."""
    folder = tmp_path_factory.mktemp("eagle")
    eagle_pair.build(tiny.target(eagle_pair.KIND), folder / "target", folder / "head")
    return folder / "target", folder / "head"


def test_plain_eagle_head_is_not_touched(text_pair: tuple[Path, Path]) -> None:
    target, head = text_pair
    options = OPTIONS | {"model": str(target)}
    eagle = options | {"draft": str(head), "method": "eagle"}
    _, expected = _serve(options, "vispec", speculative=True)
    looks, found = _serve(eagle, "vispec", speculative=True)
    assert looks["drafter"] == "EagleProposer"
    assert not looks["own_new"]
    assert looks["engine_modules"] == []
    assert {k: v[0]["token_ids"] for k, v in found.items()} == {
        k: v[0]["token_ids"] for k, v in expected.items()
    }
    rounds = [n for sequences in found.values() for n in sequences[0]["accepted_draft"]]
    assert 0 < sum(rounds) / len(rounds) < 5
