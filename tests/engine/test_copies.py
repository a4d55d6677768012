"""No operator of a speculative step copies between host and device but the uploads listed here.

Whole engine steps are watched on a CPU by the marks of :mod:`tests.support.copy_watch`: prompts
that are split, images, decoding, and one sampled request. Judged is what this package calls; what
vLLM's own code copies is vLLM's, also where it is called from here.
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
ROWS = "spec_decode/row_table.py:set_batch"
# By draft: at most one copy a step of each, from pinned memory.
UPLOADS = {
    "chain": {ROWS},
    "tree": {ROWS},
    # Where an image's tokens stand, once per image; what the gate decided, once per request.
    "gated": {
        ROWS,
        "spec_decode/row_table.py:set_choices",
        "compressors/decisions.py:decide",
        "compressors/image_tokens.py:put_rows",
    },
    "concat": {ROWS, "compressors/image_tokens.py:put_rows"},
    # Where an image's embeddings go.
    "no_compress": {ROWS, "models/uncompressed.py:embed_input_ids"},
    "unpadded": {ROWS, "models/uncompressed.py:embed_input_ids"},
    "draft_vlm": {ROWS, "draft_vlm/model.py:embed_input_ids"},
}
# V1 tells the device which tree each request has; on V2 the device knows.
V1_UPLOADS = {"tree": {"v1/tree_runner.py:_begin"}}
DEFAULT = ("chain", "tree")
FURTHER = ("gated", "concat", "no_compress", "draft_vlm")
OPTIONS = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 48}
Found = dict[str, dict[str, Any]]


def _drafts(tiny: TinyStore) -> dict[str, dict[str, Any]]:
    def head(**changes: Any) -> str:
        return tiny.pair(KIND, **changes)[1]

    compressing = {"num_q": 1, "dialect": "canonical"}
    embedding = head(compress=False, dialect="canonical")
    unpadded = {
        "method": "vispec",
        "model": embedding,
        "num_speculative_tokens": 5,
        "disable_padded_drafter_batch": True,
    }
    return {
        "chain": {"draft": head()},
        "tree": {"draft": head(), "tree": {"depth": 3, "top_k": 2}, "num_draft_tokens": 6},
        "gated": {"draft": head(compressor="select(prune:2,pool:4,text_only)", **compressing)},
        "concat": {"draft": head(compressor="concat(resampler:2,conv:2,pool:3)", **compressing)},
        "no_compress": {"draft": embedding},
        "unpadded": {"draft": embedding, "extra": {"speculative_config": unpadded}},
        "draft_vlm": {"draft": tiny.draft_vlm(KIND)[1]},
    }


def _watch(tiny: TinyStore, runner: Runner, names: tuple[str, ...]) -> Found:
    base, drafts = {**OPTIONS, "model": str(tiny.target(KIND))}, _drafts(tiny)
    engines = {name: base | drafts[name] for name in names}
    kwargs = {"kind": KIND, "engines": engines}
    items = run_in_subprocess("tests.engine.copy_jobs:watch", kwargs, runner.env())
    return {item["engine"]: item | {"runner": runner.name[:2]} for item in items}


@pytest.fixture(scope="module", params=params("v1", "v2", "v1-overlay", "v2-overlay"))
def default(request: pytest.FixtureRequest, tiny: TinyStore) -> Found:
    """Chain and tree on one runner."""
    return _watch(tiny, request.param, DEFAULT)


@pytest.fixture(scope="module", params=params("v1", "v2", slow=["v1", "v2"]))
def further(request: pytest.FixtureRequest, tiny: TinyStore) -> Found:
    """Other heads on one runner."""
    return _watch(tiny, request.param, FURTHER)


def _assert_listed_uploads_only(found: dict[str, Any]) -> None:
    name = found["engine"]
    listed = UPLOADS[name] | (V1_UPLOADS.get(name, set()) if found["runner"] == "v1" else set())
    assert found["violations"] == {}
    assert set(found["uploads"]) == listed
    assert found["same"]
    assert found["accepted"] > 0


@pytest.mark.parametrize("name", DEFAULT)
def test_listed_uploads_only(default: Found, name: str) -> None:
    _assert_listed_uploads_only(default[name])


@pytest.mark.parametrize("name", FURTHER)
def test_listed_uploads_only_with_other_heads(further: Found, name: str) -> None:
    _assert_listed_uploads_only(further[name])


@pytest.mark.slow
def test_rejected_rows_are_found_on_the_host(tiny: TinyStore) -> None:
    """V1 where `disable_padded_drafter_batch` takes rejected tokens out of the draft's batch."""
    _assert_listed_uploads_only(_watch(tiny, RUNNERS["v1"], ("unpadded",))["unpadded"])
