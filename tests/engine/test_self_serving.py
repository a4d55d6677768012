"""`vllm serve HEAD`: a head's folder finds its target, and answers like the explicit form."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.engine.setups import accepted, outputs, params
from tests.support.child import run_in_subprocess
from tests.support.hub_cache import COMMIT, hub_snapshot_folder
from tests.support.runners import RUNNERS, Runner
from tests.support.tiny_heads import HeadSpec
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

KIND = "qwen2_5_vl"
NUM_TOKENS = 3
OPTIONS: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def head(tiny: TinyStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained draft's export that names its target by a relative path."""
    from vllm_vispec.heads.export import export_head
    from vllm_vispec.heads.folder import load_draft

    folder = tmp_path_factory.mktemp("exported") / "head"
    export_head(
        load_draft(tiny.head(HeadSpec(KIND))),
        folder,
        target=os.path.relpath(tiny.target(KIND)),
        dtype="float32",
        num_speculative_tokens=NUM_TOKENS,
        provenance={"command": "a test"},
    )
    return folder


@pytest.mark.parametrize("runner", params("v1", "v1-overlay"))
def test_answers_like_the_explicit_form(tiny: TinyStore, head: Path, runner: Runner) -> None:
    target = str(tiny.target(KIND))
    explicit = {"model": target, "draft": str(head), "num_draft_tokens": NUM_TOKENS}
    itself = {
        "model": str(head),
        "extra": {"per_request_spec_decode_metrics": "detailed"},
    }
    runs = {name: OPTIONS | run for name, run in (("explicit", explicit), ("itself", itself))}
    kwargs = {"kind": KIND, "runs": runs}
    items = run_in_subprocess("tests.engine.self_serving_jobs:serve", kwargs, runner.env())
    one, other = items
    assert other["model"] == target
    assert other["drafter"] == "ViSpecProposer"
    assert outputs(one) == outputs(other)
    assert accepted(one) == accepted(other)
    drafted = [n for rows in other["results"].values() for n in rows[0]["drafted"]]
    assert max(drafted) == NUM_TOKENS
    assert sum(n for rows in accepted(other).values() for row in rows for n in row) > 0


def _copy(head: Path, folder: Path, target: str) -> str:
    """A head's config.json alone, with another target."""
    content = json.loads((head / "config.json").read_text())
    content["speculators_config"]["verifier"]["name_or_path"] = target
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def _fetched(head: Path, cache: Path) -> str:
    """Fill a hub cache by hand with a head that names a folder; returns its hub id."""
    _copy(head, hub_snapshot_folder(cache, "org/head"), str(head))
    return "org/head"


@pytest.fixture(scope="module")
def resolved(
    tiny: TinyStore, head: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What vLLM's argument handling makes of different heads and settings."""
    folder = tmp_path_factory.mktemp("heads")
    target = str(tiny.target(KIND))
    absolute = _copy(head, folder / "absolute", target)
    cases = {
        "relative": {"model": str(head)},
        "absolute": {"model": absolute, "tokenizer": "mine"},
        "settings": {
            "model": absolute,
            "settings": {"num_speculative_tokens": 2, "method": "eagle", "image_table_size": 7},
        },
        "missing": {"model": _copy(head, folder / "missing", "../nowhere")},
        "hub": {"model": _copy(head, folder / "hub", "no-such-org/no-such-target")},
        "fetched": {"model": _fetched(head, folder / "cache")},
        "plain": {"model": target},
        "snapshot": {
            "model": _copy(head, hub_snapshot_folder(folder / "cache", "a/b"), "a/target")
        },
    }
    _copy(head, hub_snapshot_folder(folder / "cache", "a/target"), target)
    env = RUNNERS["v1"].env() | {"HF_HUB_CACHE": str(folder / "cache")}
    items = run_in_subprocess("tests.engine.self_serving_jobs:resolve", {"cases": cases}, env)
    return {item["name"]: item for item in items}


def test_the_target_is_found(
    tiny: TinyStore, head: Path, resolved: dict[str, dict[str, Any]]
) -> None:
    target = str(tiny.target(KIND))
    found = resolved["relative"]
    assert (found["model"], found["tokenizer"]) == (target, target)
    assert found["settings"] == {
        "method": "vispec",
        "num_speculative_tokens": NUM_TOKENS,
        "model": str(head),
    }
    assert resolved["absolute"]["model"] == target
    assert resolved["plain"]["model"] == target
    assert resolved["plain"]["settings"] is None


def test_a_snapshot_of_the_hub_stays_a_hub_id(resolved: dict[str, dict[str, Any]]) -> None:
    """Offline, vLLM hands over the folder that the id has on this machine."""
    found = resolved["snapshot"]
    assert found["model"] == "a/target"
    assert (found["settings"]["model"], found["settings"]["revision"]) == ("a/b", COMMIT)


def test_the_users_settings_win(resolved: dict[str, dict[str, Any]]) -> None:
    """Except for method and head, which are what was asked to be served."""
    assert resolved["absolute"]["tokenizer"] == "mine"
    settings = resolved["settings"]["settings"]
    assert (settings["num_speculative_tokens"], settings["image_table_size"]) == (2, 7)
    assert settings["method"] == "vispec"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "there is no model in"),
        ("hub", "target 'no-such-org/no-such-target', which head"),
        ("fetched", "as its target, which a head from a hub may not"),
    ],
)
def test_a_target_that_cannot_be_had(
    resolved: dict[str, dict[str, Any]], name: str, message: str
) -> None:
    found = resolved[name]
    assert found["kind"] == "ViSpecError"
    assert message in found["error"]
    assert "\n" not in found["error"]
