"""Engines that start with what earlier ones compiled (V1, inductor, vLLM's caches).

One process compiles, two more start with its cache: the same engines, then one whose head was
trained further in its folder, then one with another table of images. All answer in fp32 what eager
engines answer: tokens, drafts and acceptance.

"piecewise" is what GPUs do by default. There vLLM loads what the first process compiled. "inductor"
is the CPU's default, where vLLM 0.32 and 0.33 write artefacts that they cannot load (a warning says
so, without a head too) and compile again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_starts import KIND, assert_same, options
from tests.support.child import run_in_subprocess
from tests.support.runners import RUNNERS
from tests.support.tiny_store import TinyStore

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

CHAIN, TREE = ("chain", "piecewise"), ("tree", "piecewise")
HEAD, TABLE = ("head", "piecewise"), ("table", "piecewise")
CPU_CHAIN = ("chain", "inductor")
# A process each, with (engine, compiler); they share a cache.
PROCESSES: Mapping[str, tuple[tuple[str, str | None], ...]] = {
    "eager": (("chain", None), ("tree", None)),
    "eager-others": (("head", None), ("table", None)),
    "first": (CHAIN, TREE, CPU_CHAIN),
    "second": (CHAIN, CPU_CHAIN),
    "third": (HEAD, TABLE),
}
OTHER_WEIGHTS = ("eager-others", "third")
COMPILING = ("first", "second", "third")
Restarts = dict[tuple[str, str], dict[str, Any]]


def _options(tiny: TinyStore, name: str, lists: Path) -> dict[str, Any]:
    """Return the options of engine ``name``; all read their head from the same folder."""
    found = options(tiny, "tree" if name == "tree" else "chain", lists)
    config = found["extra"]["speculative_config"]
    config["model"] = found["draft"] = str(lists / "head")
    if name == "table":
        config["image_table_size"] = 3
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the cache and the processes' logs are."""
    return tmp_path_factory.mktemp("restarts")


@pytest.fixture(scope="module")
def restarts(tiny: TinyStore, folder: Path) -> Restarts:
    """What every engine of every process answered."""
    env = RUNNERS["v1"].env() | {"VLLM_CACHE_ROOT": str(folder / "cache")}
    found: Restarts = {}
    heads = {False: tiny.pair(KIND)[1], True: tiny.pair(KIND, seed=3, noise=1.5)[1]}
    for process, engines in PROCESSES.items():
        weights = heads[process in OTHER_WEIGHTS]
        shutil.copytree(weights, folder / "head", dirs_exist_ok=True)
        starts = [
            {
                "name": f"{name}-{compiler}",
                "options": {
                    **_options(tiny, name, folder),
                    "compiler": compiler,
                    "memory_profile": compiler is not None,
                },
            }
            for name, compiler in engines
        ]
        items = run_in_subprocess(
            "tests.engine.start_jobs:serve",
            {"kind": KIND, "starts": starts},
            env,
            timeout=1200,
            log_file=folder / f"{process}.txt",
        )
        found |= {(process, item["name"]): item for item in items}
    return found


@pytest.mark.parametrize(
    ("process", "name", "compiler"),
    [(process, *engine) for process in COMPILING for engine in PROCESSES[process]],
)
def test_answers_are_those_of_eager_engines(
    restarts: Restarts, process: str, name: str, compiler: str
) -> None:
    found = restarts[process, f"{name}-{compiler}"]
    assert len(found["compiled"]) == 2
    assert not found["kv_cache_given"]
    eager = "eager-others" if process in OTHER_WEIGHTS else "eager"
    assert_same(restarts[eager, f"{name}-None"], found)


def test_the_second_start_loads_what_the_first_compiled(restarts: Restarts) -> None:
    assert restarts["first", "chain-piecewise"]["loaded"] == []
    assert restarts["second", "chain-piecewise"]["loaded"] == ["Qwen2Model", "ViSpecModel"]


def test_a_head_with_other_weights_loads_it_too(restarts: Restarts) -> None:
    """Weights are no part of an artefact; drafts are those of the head that is served."""
    assert restarts["third", "head-piecewise"]["loaded"] == ["Qwen2Model", "ViSpecModel"]
    first, third = restarts["first", "chain-piecewise"], restarts["third", "head-piecewise"]
    assert first["drafts"] != third["drafts"]


def test_another_table_compiles_anew(restarts: Restarts) -> None:
    assert restarts["third", "table-piecewise"]["loaded"] == []


@pytest.mark.parametrize("process", COMPILING)
def test_no_traceback_is_printed(restarts: Restarts, folder: Path, process: str) -> None:
    assert len([key for key in restarts if key[0] == process]) == len(PROCESSES[process])
    log = (folder / f"{process}.txt").read_text()
    assert "vllm" in log
    assert "Traceback" not in log
    assert "Exception ignored" not in log
