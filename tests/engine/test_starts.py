"""Engines start as GPUs start them: a memory profile, compiled models, bf16.

Each kind of draft starts once that way on both runners and releases, and answers what the eager
engine of the same dtype with a given KV cache answers. The models' graphs are traced by dynamo and
run as they are, so results are the same to the last bit: tokens, drafts and acceptance are compared
strictly, in bf16 too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.engine.setups import accepted, mean_accepted, outputs, params
from tests.support.child import run_in_subprocess
from tests.support.runners import RUNNERS, Runner
from tests.support.tiny_configs import VOCAB
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
SIZES: Mapping[str, Any] = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64}
GPU: Mapping[str, Any] = {"compiler": "eager", "memory_profile": True, "dtype": "bfloat16"}
# Engines that compile leave norms and activations to the compiler, others have kernels for them.
UNCOMPILED: Mapping[str, Any] = {"compilation_config": {"custom_ops": ["none"]}}
EAGLE2 = {"policy": "eagle2", "depth": 3, "top_k": 2}
PATH = {"policy": "spec_llava", "depth": 3, "top_k": 1, "threshold": 0.9}
GATED = {"compressor": "select(prune:2,pool:4,text_only)", "num_q": 1, "dialect": "canonical"}
PLAIN_ROWS = {"compress": False, "dialect": "canonical"}
SCHEDULE = [[1, 1, 4], [2, 2, 1], [3, 4, 2]]
# Changes to the head, and speculative settings.
KINDS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "chain": ({}, {}),
    "tree": ({}, {"tree": EAGLE2, "num_speculative_tokens": 7}),
    "path": ({}, {"tree": PATH}),
    "draft_vlm": ({}, {}),
    "gated": (GATED, {}),
    "no_compression": (PLAIN_ROWS, {}),
    "draft_vocab": ({}, {"draft_vocab": [token for token in range(VOCAB) if token % 3]}),
    "schedule": ({}, {"num_speculative_tokens_per_batch_size": SCHEDULE}),
}
DRAFTS = {"draft_vlm": "DraftVlmModel", "no_compression": "EmbedsModel"}
Started = dict[str, dict[str, Any]]


def options(tiny: TinyStore, kind: str, lists: Path) -> dict[str, Any]:
    """Return the options of an eager engine with a draft of ``kind``."""
    changes, settings = KINDS[kind]
    target, head = tiny.draft_vlm(KIND) if kind == "draft_vlm" else tiny.pair(KIND, **changes)
    config = {"method": "vispec", "model": head, "num_speculative_tokens": 4, **settings}
    if "draft_vocab" in config:
        file = lists / "vocab.json"
        file.write_text(json.dumps({"token_ids": config["draft_vocab"]}))
        config["draft_vocab"] = str(file)
    extra = {"speculative_config": config}
    return {**SIZES, "model": target, "draft": head, "extra": extra}


def serve(runner: Runner, starts: list[dict[str, Any]]) -> Started:
    """Serve with one engine after another in a child process; what each answered by its name."""
    kwargs = {"kind": KIND, "starts": starts}
    items = run_in_subprocess("tests.engine.start_jobs:serve", kwargs, runner.env(), 1500)
    return {item["name"]: item for item in items}


def assert_same(eager: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Same tokens, same drafts, and as many of them accepted in every round."""
    assert outputs(found) == outputs(eager)
    assert found["drafts"] == eager["drafts"]
    assert accepted(found) == accepted(eager)
    assert mean_accepted(found) > 0


@pytest.fixture(scope="module", params=params(*RUNNERS, slow=["v2"]))
def starts(
    request: pytest.FixtureRequest, tiny: TinyStore, tmp_path_factory: pytest.TempPathFactory
) -> Started:
    """Every kind on one runner, eager with a given KV cache and as on a GPU."""
    runner: Runner = request.param
    lists = tmp_path_factory.mktemp("lists")
    wanted = []
    for kind in KINDS:
        base = options(tiny, kind, lists)
        eager = {**base, "dtype": GPU["dtype"], "extra": base["extra"] | UNCOMPILED}
        wanted.append({"name": f"{kind}-eager", "options": eager})
        wanted.append({"name": f"{kind}-gpu", "options": base | dict(GPU)})
    return serve(runner, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_on_a_gpu(starts: Started, kind: str) -> None:
    eager, found = starts[f"{kind}-eager"], starts[f"{kind}-gpu"]
    assert eager["kv_cache_given"]
    assert eager["compiled"] == []
    assert not found["kv_cache_given"]
    assert found["dtype"] == "torch.bfloat16"
    assert DRAFTS.get(kind, "ViSpecModel") in found["compiled"]
    assert len(found["compiled"]) == 2
    assert_same(eager, found)
