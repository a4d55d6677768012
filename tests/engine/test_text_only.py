"""A vision language model that was started for text only: no vision tower, no encoder cache.

Every draft gives plain vLLM's tokens there, and has as many drafts accepted as in an engine that
takes images and is asked the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.engine import setups
from tests.engine.setups import Served, accepted, assert_same, mean_accepted, params, setup
from tests.support.runners import Runner
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

KIND = "qwen2_5_vl"
NO_IMAGES: Mapping[str, Mapping[str, Any]] = {
    "v1": {"limit_mm_per_prompt": {"image": 0, "video": 0}},
    "v2": {"language_model_only": True},
}
TREE = {"tree": {"depth": 3, "top_k": 2}, "num_draft_tokens": 6}
OPTIONS = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64}
SCENARIO: Mapping[str, Any] = {"text": {}}
DEFAULT = ("chain", "tree")
FURTHER = ("draft_vlm", "no_compress", "gated")


def drafts(tiny: TinyStore) -> dict[str, dict[str, Any]]:
    """Return the options of each draft by name."""
    gate = {"compressor": "select(prune:2,pool:4,text_only)", "num_q": 1, "dialect": "canonical"}
    head = tiny.pair(KIND)[1]
    return {
        "chain": {"draft": head},
        "tree": {"draft": head, **TREE},
        "draft_vlm": {"draft": tiny.draft_vlm(KIND)[1]},
        "no_compress": {"draft": tiny.pair(KIND, compress=False, dialect="canonical")[1]},
        "gated": {"draft": tiny.pair(KIND, **gate)[1]},
    }


def serve(tiny: TinyStore, runner: Runner, names: tuple[str, ...]) -> Served:
    """Serve the same text plainly and with every draft, with and without room for images."""
    base = {**OPTIONS, "model": str(tiny.target(KIND))}
    text_only = {"extra": dict(NO_IMAGES[runner.name.split("-")[0]])}
    engines = [setup("plain", KIND, base | text_only, SCENARIO)]
    for name in names:
        options = base | drafts(tiny)[name]
        engines.append(setup(f"{name}-images", KIND, options, SCENARIO))
        engines.append(setup(f"{name}-text", KIND, options | text_only, SCENARIO))
    return setups.serve(runner, engines)


@pytest.fixture(scope="module", params=params("v1", "v2", "v2-overlay", slow=["v1"]))
def served(request: pytest.FixtureRequest, tiny: TinyStore) -> Served:
    """The drafts of the default set on one runner."""
    return serve(tiny, request.param, DEFAULT)


@pytest.fixture(scope="module", params=params("v1", "v2", slow=["v1", "v2"]))
def further(request: pytest.FixtureRequest, tiny: TinyStore) -> Served:
    """All other drafts on one runner."""
    return serve(tiny, request.param, FURTHER)


def _assert_as_with_images(served: Served, name: str) -> None:
    text_only = served[f"{name}-text", "text"]
    assert_same(served["plain", "text"], text_only)
    assert mean_accepted(text_only) > 0
    assert accepted(text_only) == accepted(served[f"{name}-images", "text"])


@pytest.mark.parametrize("name", DEFAULT)
def test_tokens_and_acceptance_without_images(served: Served, name: str) -> None:
    _assert_as_with_images(served, name)


@pytest.mark.parametrize("name", FURTHER)
def test_further_drafts_without_images(further: Served, name: str) -> None:
    _assert_as_with_images(further, name)
