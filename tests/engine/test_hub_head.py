"""A head's hub id goes to the workers, not the folder it has on the front process's machine."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest

from tests.engine.setups import accepted, outputs
from tests.support.child import run_in_subprocess
from tests.support.hub_cache import COMMIT, fill_hub_cache
from tests.support.runners import RUNNERS
from tests.support.tiny_configs import VOCAB
from tests.support.tiny_store import TinyStore
from vllm_vispec.draft_vocab.files import write_vocab
from vllm_vispec.heads.folder import DRAFT_VOCAB

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

KIND, HUB_ID = "qwen2_5_vl", "org/head"
OTHER_PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


def _serve(runner: str, env: dict[str, str], **kwargs: Any) -> dict[str, Any]:
    env = RUNNERS[runner].env() | env
    (found,) = run_in_subprocess("tests.engine.hub_head_jobs:serve", {"kind": KIND, **kwargs}, env)
    return dict(found)


@pytest.fixture(scope="module")
def pair(tiny: TinyStore) -> tuple[str, Path]:
    """A target, and a head with a list of draft tokens, of which every third is missing."""
    target, head = tiny.pair(KIND, seed=78)
    write_vocab(Path(head) / DRAFT_VOCAB, [token for token in range(VOCAB) if token % 3])
    return target, Path(head)


@pytest.fixture(scope="module")
def by_folder(pair: tuple[str, Path]) -> dict[str, Any]:
    target, head = pair
    settings = {"model": str(head), "draft_vocab": "auto"}
    found = _serve("v1", {}, target=target, settings=settings, caches=[])
    assert (found["model"], found["revision"]) == (str(head), None)
    return found


@pytest.mark.parametrize("runner", ["v1", pytest.param("v2", marks=pytest.mark.slow)])
def test_worker_with_a_cache_of_its_own(
    pair: tuple[str, Path], by_folder: dict[str, Any], tmp_path: Path, runner: str
) -> None:
    target, head = pair
    caches = [tmp_path / "front", tmp_path / "workers"]
    for cache in caches:
        fill_hub_cache(cache, HUB_ID, head)
    found = _serve(
        runner,
        OTHER_PROCESSES | {"HF_HUB_CACHE": str(caches[0])},
        target=target,
        settings={"model": HUB_ID, "draft_vocab": "auto"},
        caches=[str(cache) for cache in caches],
    )
    assert not caches[0].exists()
    assert (found["model"], found["revision"]) == (HUB_ID, COMMIT)
    assert outputs(found) == outputs(by_folder)
    assert accepted(found) == accepted(by_folder)


def test_worker_without_the_head(tmp_path: Path) -> None:
    kwargs = {"model": HUB_ID, "revision": COMMIT}
    env = {"HF_HUB_CACHE": str(tmp_path)}
    (said,) = run_in_subprocess("tests.engine.hub_head_jobs:find_head", kwargs, env)
    assert said.startswith(
        f"worker on {platform.node()}: head {HUB_ID!r} at revision {COMMIT!r} is no local folder"
    )
    assert "check the name, your network and token" in said
    assert "\n" not in said
