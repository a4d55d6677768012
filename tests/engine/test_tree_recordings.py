"""V2 engines grow the same trees by recordings as eagerly, in batches that vLLM pads."""

from __future__ import annotations

import pytest

from tests.engine.setups import accepted, outputs, params
from tests.support.child import run_in_subprocess
from tests.support.runners import Runner
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
WIDTH = 4


@pytest.mark.parametrize("runner", params("v2", "v2-overlay"))
def test_recorded_trees(runner: Runner, tiny: TinyStore) -> None:
    target, head = tiny.pair(KIND)
    options = {
        "model": target,
        "draft": head,
        "num_draft_tokens": 19,
        "tree": {"policy": "eagle2", "top_k": WIDTH},
        "max_model_len": 256,
        "max_num_seqs": 12,
        "max_num_batched_tokens": 96,
    }
    # Trees of 1, 3 and 6 requests, and walks of 4 and 12.
    kwargs = {"kind": KIND, "options": options, "sizes": [WIDTH, 3 * WIDTH, 6 * WIDTH]}
    eager, recorded = run_in_subprocess(
        "tests.engine.tree_graph_jobs:serve", kwargs, runner.env(), 900
    )
    assert outputs(recorded) == outputs(eager)
    assert accepted(recorded) == accepted(eager)
    replayed = {tuple(graph) for graph in recorded["replayed"]}
    assert replayed >= {(WIDTH, 3), (WIDTH, 6), (1, 4)}
