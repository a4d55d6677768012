"""What full CUDA graphs capture of the draft neither reads from the device nor changes shape.

The passes of the draft model are recorded operator by operator for two batches of the same size,
one of text, one with images. Left out is vLLM's own attention backend, which has its own code per
device. Host work of ours must lie outside the functions that vLLM captures.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.setups import params
from tests.support.child import run_in_subprocess
from tests.support.runners import RUNNERS, Runner
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
NUM_REQUESTS = 4
Batches = dict[str, dict[str, Any]]


UNCOMPRESSED = {"compress": False, "dialect": "canonical"}
GATED = {"compressor": "select(prune:2,pool:4,text_only)", "num_q": 1, "dialect": "canonical"}
HEADS = [
    *(
        pytest.param((p.values[0], {}), id=p.id, marks=p.marks)
        for p in params("v1", "v2", "v2-overlay", slow=["v2"])
    ),
    pytest.param((RUNNERS["v1"], UNCOMPRESSED), id="v1-no_compress", marks=pytest.mark.slow),
    *(
        pytest.param((p.values[0], None), id=f"{p.id}-vlm", marks=[*p.marks, pytest.mark.slow])
        for p in params("v1", "v2")
    ),
    *(
        pytest.param((p.values[0], GATED), id=f"{p.id}-gated", marks=[*p.marks, pytest.mark.slow])
        for p in params("v2")
    ),
]


@pytest.fixture(scope="module", params=HEADS)
def recorded(request: pytest.FixtureRequest, tiny: TinyStore) -> Batches:
    """Operators of every draft pass, by batch."""
    runner: Runner
    runner, changes = request.param
    target, head = tiny.draft_vlm(KIND) if changes is None else tiny.pair(KIND, **changes)
    options = {
        "model": target,
        "draft": head,
        "max_num_seqs": NUM_REQUESTS,
        "max_model_len": 256,
    }
    items = run_in_subprocess(
        "tests.engine.static_jobs:inspect", {"kind": KIND, "options": options}, runner.env()
    )
    return {item["batch"]: item for item in items}


@pytest.mark.parametrize("batch", ["text", "images"])
def test_nothing_is_read_back(recorded: Batches, batch: str) -> None:
    assert recorded[batch]["violations"] == []
    assert f"pass {NUM_REQUESTS}" in recorded[batch]["passes"]


def test_operators_depend_on_the_size_alone(recorded: Batches) -> None:
    """Every pass over as many tokens runs the same operators on the same shapes.

    What happens between passes lies outside the graphs, and is left out where nothing changes.
    """
    text, images = (
        {key: kinds for key, kinds in recorded[name]["passes"].items() if key.startswith("pass ")}
        for name in ("text", "images")
    )
    for passes in (text, images):
        assert {key: len(kinds) for key, kinds in passes.items() if len(kinds) > 1} == {}
    shared = set(text) & set(images)
    # A draft step and a full verification round are among them.
    assert {f"pass {NUM_REQUESTS}", f"pass {6 * NUM_REQUESTS}"} <= shared
    for key in shared:
        assert text[key] == images[key], key


def test_host_work_lies_outside(recorded: Batches) -> None:
    """V2 captures ``_prefill`` and the decode loop; filling codes and lookups happen elsewhere."""
    assert all(batch["inside"] == [] for batch in recorded.values())


def test_buffers_stay_in_place(recorded: Batches) -> None:
    assert all(batch["moved"] == [] for batch in recorded.values())
