"""Engines with vLLM's defaults on a GPU: memory profile, compiled models, CUDA graphs, V2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.setups import mean_accepted, outputs
from tests.engine.test_starts import KIND, KINDS, SIZES, options
from tests.support.child import ChildError, run_in_subprocess
from tests.support.tiny_store import TinyStore

pytestmark = pytest.mark.timeout(1200)
MEMORY: dict[str, Any] = {"gpu_memory_utilization": 0.3}
Served = dict[str, dict[str, Any]]


def start(name: str, tiny: TinyStore, lists: Path, dtype: str, **more: Any) -> dict[str, Any]:
    """Return one start for `engine_jobs.serve`; ``plain`` has no draft."""
    if name == "plain":
        arguments: dict[str, Any] = {"model": str(tiny.target(KIND))}
    else:
        given = options(tiny, name, lists)
        arguments = {"model": given["model"], **given["extra"]}
    arguments |= {**SIZES, **MEMORY, "dtype": dtype}
    return {"name": name, "arguments": arguments | more}


def serve(starts: list[dict[str, Any]], env: dict[str, str] | None = None) -> Served:
    """Start and serve in one child process; what each start answered by its name."""
    kwargs = {"kind": KIND, "starts": starts}
    items = run_in_subprocess("tests.gpu.engine_jobs:serve", kwargs, env or {}, 1100)
    return {item["name"]: item for item in items}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def found(
    request: pytest.FixtureRequest, tiny: TinyStore, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Served]:
    """Plain vLLM and every kind of draft, in one dtype."""
    lists = tmp_path_factory.mktemp("lists")
    names = ["plain", *KINDS]
    return request.param, serve([start(name, tiny, lists, request.param) for name in names])


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_change_no_answer(found: tuple[str, Served], kind: str) -> None:
    dtype, served = found
    assert mean_accepted(served[kind]) > 0
    if dtype == "float32":
        # In 16 bits batches of other shapes round otherwise: `vispec verify` judges those.
        assert outputs(served[kind]) == outputs(served["plain"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_v2_runner_records_graphs(found: tuple[str, Served], kind: str) -> None:
    dtype, served = found
    assert served[kind]["runner"] == "V2"
    graphs = " ".join(served[kind]["graphs"])
    assert "target" in graphs or "compiled pieces" in graphs, graphs
    if kind == "tree" and dtype == "bfloat16":
        assert "growth of draft trees, FULL" in graphs
        assert "walks down draft trees, FULL" in graphs


def test_without_graphs(tiny: TinyStore, tmp_path: Path) -> None:
    names = ("plain", "chain", "tree")
    eager = [start(name, tiny, tmp_path, "float32", enforce_eager=True) for name in names]
    served = serve(eager)
    for name in names[1:]:
        assert outputs(served[name]) == outputs(served["plain"])
        assert not any("FULL" in graph for graph in served[name]["graphs"])


def test_the_v1_runner(tiny: TinyStore, tmp_path: Path) -> None:
    names = ("plain", "chain", "tree")
    starts = [start(name, tiny, tmp_path, "float32") for name in names]
    served = serve(starts, {"VLLM_USE_V2_MODEL_RUNNER": "0"})
    for name in names[1:]:
        assert served[name]["runner"] == "V1"
        assert outputs(served[name]) == outputs(served["plain"])


@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_sleep_of_level_two(tiny: TinyStore, tmp_path: Path, kind: str) -> None:
    sleeping = start(kind, tiny, tmp_path, "float32", enable_sleep_mode=True) | {"sleep": True}
    served = serve([sleeping])[kind]
    assert outputs(served | {"results": served["after"]}) == outputs(served)


def test_a_quantized_cache(tiny: TinyStore, tmp_path: Path) -> None:
    """Where the device has no fp8 attention, plain vLLM is refused too."""
    names = ("plain", "chain")
    starts = [start(name, tiny, tmp_path, "bfloat16", kv_cache_dtype="fp8") for name in names]
    try:
        served = serve(starts)
    except ChildError as error:
        assert error.items == []  # noqa: PT017  # not even plain vLLM started
        return
    assert mean_accepted(served["chain"]) > 0


def test_a_target_served_without_images(tiny: TinyStore, tmp_path: Path) -> None:
    starts = [
        start(name, tiny, tmp_path, "float32", limit_mm_per_prompt={"image": 0, "video": 0})
        for name in ("plain", "chain", "tree")
    ]
    served = serve([one | {"text_only": True} for one in starts])
    for name in ("chain", "tree"):
        assert outputs(served[name]) == outputs(served["plain"])
        assert mean_accepted(served[name]) > 0
