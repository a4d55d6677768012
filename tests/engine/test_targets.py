"""Each supported family with real images; both spellings of the method; every dialect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.setups import Served, accepted, mean_accepted, outputs, params, serve, setup
from tests.support.child import run_in_subprocess
from tests.support.runners import RUNNERS
from tests.support.tiny_configs import FAMILIES
from tests.support.tiny_heads import HeadSpec
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

OPTIONS: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
}
NUM_DRAFT_TOKENS = 5
V2_KINDS = ("qwen2_5_vl", "qwen3_vl")


def _family(tiny: TinyStore, kind: str, count: int) -> list[dict[str, Any]]:
    target, head = tiny.pair(kind)
    return [
        setup(
            f"{kind}-{name}",
            kind,
            OPTIONS | {"model": target, "draft": draft},
            {"mixed": {"count": count, "max_tokens": 16}},
        )
        for name, draft in (("plain", None), ("spec", head))
    ]


def _assert_served(served: Served, kind: str) -> None:
    plain, spec = served[f"{kind}-plain", "mixed"], served[f"{kind}-spec", "mixed"]
    assert outputs(plain) == outputs(spec)
    assert 0 < mean_accepted(spec) < NUM_DRAFT_TOKENS
    assert spec["table"]["computed"] > 0
    assert spec["table"]["misses"] == 0


@pytest.fixture(scope="module")
def v1(tiny: TinyStore) -> Served:
    """All families, each without and with its head."""
    setups = [item for kind in FAMILIES for item in _family(tiny, kind, 16)]
    return serve(RUNNERS["v1"], setups)


@pytest.mark.parametrize("kind", FAMILIES)
def test_v1_family(v1: Served, kind: str) -> None:
    _assert_served(v1, kind)


@pytest.fixture(scope="module", params=params("v2", "v1-overlay", slow=["v2"]))
def other(request: pytest.FixtureRequest, tiny: TinyStore) -> Served:
    """Two families with the other runners."""
    setups = [item for kind in V2_KINDS for item in _family(tiny, kind, 8)]
    return serve(request.param, setups)


@pytest.mark.parametrize("kind", V2_KINDS)
def test_other_runners_family(other: Served, kind: str) -> None:
    _assert_served(other, kind)


@pytest.fixture(scope="module")
def spellings(
    tiny: TinyStore, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """One head in two dialects, each converted too, and as ``"method": "eagle"``."""
    from vllm_vispec.heads.export import convert_head

    kind, folder = "qwen2_5_vl", tmp_path_factory.mktemp("converted")
    runs: dict[str, tuple[Path, str]] = {}
    for dialect in ("reference", "automodel"):
        head = tiny.head(HeadSpec(kind, dialect=dialect))
        convert_head(head, folder / dialect)
        runs[dialect] = (head, "vispec")
        runs[f"{dialect}-eagle"] = (head, "eagle")
        runs[f"{dialect}-canonical"] = (folder / dialect, "vispec")
    runs["canonical-eagle"] = (folder / "reference", "eagle")
    base = OPTIONS | {"model": str(tiny.target(kind))}
    options = {
        name: base | {"draft": str(head), "method": method} for name, (head, method) in runs.items()
    }
    kwargs = {"kind": kind, "runs": options}
    items = run_in_subprocess("tests.engine.dialect_jobs:serve", kwargs, RUNNERS["v1"].env())
    return {item["name"]: item for item in items}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("reference-canonical", "reference"),
        ("reference-eagle", "reference"),
        ("canonical-eagle", "reference"),
        ("automodel-canonical", "automodel"),
        ("automodel-eagle", "automodel"),
    ],
)
def test_same_drafts_however_the_head_is_written(
    spellings: dict[str, dict[str, Any]], name: str, reference: str
) -> None:
    """Converted heads and the other spelling of the method: draft for draft the same."""
    one, other = spellings[name], spellings[reference]
    assert outputs(one) == outputs(other)
    assert accepted(one) == accepted(other)
    assert mean_accepted(one) > 0
    assert one["drafts"].keys() == other["drafts"].keys()
    for key, row in one["drafts"].items():
        assert row == pytest.approx(other["drafts"][key], rel=1e-5, abs=1e-4), key


@pytest.mark.slow
def test_dialects_differ(spellings: dict[str, dict[str, Any]]) -> None:
    """The Automodel head has norms of its own: same text, other logits behind the drafts."""
    one, other = spellings["reference"], spellings["automodel"]
    assert outputs(one) == outputs(other)
    shared = one["drafts"].keys() & other["drafts"].keys()
    gaps = [abs(one["drafts"][key][2] - other["drafts"][key][2]) for key in shared]
    assert max(gaps) > 1
