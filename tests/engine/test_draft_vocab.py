"""A draft with a vocabulary of its own: outputs are the target's, drafts are of that vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine.setups import accepted, mean_accepted, outputs, params
from tests.support.child import run_in_subprocess
from tests.support.runners import RUNNERS, Runner
from tests.support.tiny_configs import VOCAB
from tests.support.tiny_store import TinyStore
from vllm_vispec.draft_vocab.files import write_vocab
from vllm_vispec.heads.folder import DRAFT_VOCAB

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
OPTIONS = {"max_num_seqs": 8, "max_model_len": 256, "max_num_batched_tokens": 128}
FEW = [token for token in range(VOCAB) if token % 3]
Served = dict[str, dict[str, Any]]


def setups(head: Path, lists: Path) -> dict[str, dict[str, Any] | None]:
    """Speculative configs by name; the head's folder gets a list of its own."""
    shuffled = [(token * 7) % VOCAB for token in range(VOCAB)]
    everything, few = lists / "all.json", lists / "few.json"
    everything.write_text(json.dumps(shuffled))
    few.write_text(json.dumps({"token_ids": FEW}))
    write_vocab(head / DRAFT_VOCAB, shuffled)
    base = {"method": "vispec", "model": str(head), "num_speculative_tokens": 4}
    return {
        "plain": None,
        "whole": base,
        "all": base | {"draft_vocab": str(everything)},
        "few": base | {"draft_vocab": str(few)},
        "first": base | {"draft_vocab": 200},
        "logits": base | {"draft_vocab": str(few), "draft_sample_method": "probabilistic"},
    }


@pytest.fixture(scope="module", params=params("v1", "v2"))
def served(
    request: pytest.FixtureRequest, tiny: TinyStore, tmp_path_factory: pytest.TempPathFactory
) -> Served:
    """What every setup answered, and what it drafted."""
    runner: Runner = request.param
    # A head of its own: a list in the folder of others' would be theirs, too.
    target, head = tiny.pair(KIND, seed=77)
    found = setups(Path(head), tmp_path_factory.mktemp("lists"))
    if runner.name == "v2":
        # Triton's interpreter refuses a mask in vLLM's kernel that samples drafts.
        del found["logits"]
    kwargs = {
        "kind": KIND,
        "options": OPTIONS | {"model": target},
        "setups": found,
        "count": 8,
    }
    items = run_in_subprocess("tests.engine.vocab_jobs:serve", kwargs, runner.env(), 1500)
    return {item["setup"]: item for item in items}


def test_outputs_are_those_of_plain_decoding(served: Served) -> None:
    assert {"plain", "whole", "all", "few", "first"} <= set(served)
    for name in set(served) - {"plain"}:
        assert outputs(served[name]) == outputs(served["plain"]), name
        assert mean_accepted(served[name]) > 0, name


def test_a_list_of_all_tokens_changes_no_draft(served: Served) -> None:
    assert accepted(served["all"]) == accepted(served["whole"])
    assert served["all"]["drafted"] != []


def test_only_tokens_of_the_list_are_drafted(served: Served) -> None:
    assert not set(served["whole"]["drafted"]) <= set(FEW)
    for name in {"few", "logits"} & set(served):
        assert set(served[name]["drafted"]) <= set(FEW), name
    first = {(token * 7) % VOCAB for token in range(200)}
    assert set(served["first"]["drafted"]) <= first


def test_fewer_tokens_are_accepted_less_often(served: Served) -> None:
    assert mean_accepted(served["few"]) < 0.8 * mean_accepted(served["whole"])


def test_the_lm_head_is_as_small_as_the_list(served: Served) -> None:
    """Up to vLLM's padding of 64 rows."""
    assert served["whole"]["lm_head_rows"] >= VOCAB
    assert len(FEW) <= served["few"]["lm_head_rows"] < len(FEW) + 64
    assert served["first"]["lm_head_rows"] == 256


def test_the_choice_reads_nothing_back_and_has_a_fixed_shape(served: Served) -> None:
    """Logits are scattered only where drafts are sampled."""
    assert served["few"]["watched"] == ["get_top_tokens"]
    assert served["few"]["violations"] == []
    if "logits" in served:
        assert "compute_logits" in served["logits"]["watched"]
        assert served["logits"]["violations"] == []


@pytest.fixture(scope="module")
def served_by_two(tiny: TinyStore, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Two tensor-parallel workers, each with half of the draft's lm_head; and one worker."""
    target, head = tiny.pair(KIND, seed=77)
    found = setups(Path(head), tmp_path_factory.mktemp("lists"))
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    base = OPTIONS | {"model": target, "draft": head}
    one = {"speculative_config": found["few"]}
    extras: dict[str, dict[str, Any]] = {"two": two | one, "one": one}
    runs = {name: base | {"extra": extra} for name, extra in extras.items()}
    kwargs = {"kind": KIND, "runs": runs, "count": 8}
    items = run_in_subprocess("tests.engine.parallel_jobs:serve", kwargs, RUNNERS["v1"].env(), 1500)
    return {item["name"]: item for item in items}


def test_two_workers_draft_like_one(served_by_two: Served) -> None:
    one, two = served_by_two["one"], served_by_two["two"]
    assert accepted(two) == accepted(one)
    assert mean_accepted(two) > 0
    assert outputs(two) == outputs(one)
