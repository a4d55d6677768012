"""Engines with vLLM's defaults on a GPU: memory profile, compiled models, CUDA graphs, V2."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.support.child import Child, ChildError
from tests.support.drafts import DRAFTS, SIZES, start_options, start_requests
from tests.support.engine import EngineOptions, Engines, register_plugin, stop
from tests.support.spies import drafter
from tests.support.tiny_store import TinyStore
from tests.support.workloads import Served, drive

pytestmark = pytest.mark.timeout(1200)
EXTENSION = "vllm_vispec.verify.worker.VerifyWorker"


@dataclass(frozen=True)
class Found:
    """What an engine answered, before and ``after`` a sleep; its runner and recorded graphs."""

    served: Served
    runner: str
    graphs: dict[str, Any]
    after: Served | None = None


def start(name: str, tiny: TinyStore, dtype: str, **more: Any) -> dict[str, Any]:
    """Return the arguments of an engine with vLLM's defaults; ``plain`` has no draft."""
    arguments: dict[str, Any] = {"model": str(tiny.target())}
    if name != "plain":
        options = EngineOptions.of(**arguments, **start_options(tiny, name)).llm_kwargs()
        arguments["speculative_config"] = options["speculative_config"]
        arguments["per_request_spec_decode_metrics"] = "detailed"
    return {**arguments, **SIZES, "gpu_memory_utilization": 0.3, "dtype": dtype, **more}


def serve(child: Child, starts: dict[str, dict[str, Any]], **how: bool) -> dict[str, Found]:
    """Start one engine after another; what each answered by its name."""
    return {name: child.call(run, arguments, **how) for name, arguments in starts.items()}


def run(arguments: dict[str, Any], text_only: bool = False, sleep: bool = False) -> Found:
    """Serve the same requests with an engine (in its process).

    With ``sleep`` it sleeps at level 2, wakes up with its weights read again, and serves them a
    second time; with ``text_only`` requests with images are left out.
    """
    register_plugin()
    from vllm import LLM

    wanted = [one for one in start_requests(16) if not (text_only and one.images)]
    llm = LLM(disable_log_stats=False, worker_extension_cls=EXTENSION, seed=0, **arguments)
    try:
        served = Served(drive(llm, wanted))
        (state,) = llm.collective_rpc("vispec_state")
        found = Found(served, state["runner"], state["graphs"])
        if sleep:
            _sleep_and_wake(llm)
            found = replace(found, after=Served(drive(llm, wanted)))
    finally:
        stop(llm)
    return found


def _sleep_and_wake(llm: Any) -> None:
    """Lose weights and KV cache, as users of reinforcement learning do between two updates."""
    from vllm.model_executor.model_loader import get_model_loader

    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    # vLLM's `reload_weights` leaves the draft out.
    config = llm.llm_engine.vllm_config
    draft_config = config.speculative_config.draft_model_config
    get_model_loader(config.load_config).load_weights(drafter(llm).model, draft_config)
    llm.wake_up(tags=["kv_cache"])


def assert_same(served: dict[str, Found]) -> None:
    """All answer what plain vLLM answers."""
    for name in set(served) - {"plain"}:
        assert served[name].served.outputs() == served["plain"].served.outputs(), name
        assert served[name].served.acceptance() > 0, name


SOME = ("plain", "chain", "tree")


@pytest.fixture
def here(engines: Engines) -> Child:
    """The process of engines as vLLM starts them on this machine."""
    return engines.child({})


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def found(
    request: pytest.FixtureRequest, engines: Engines, tiny: TinyStore
) -> tuple[str, dict[str, Found]]:
    """Plain vLLM and every kind of draft, in one dtype."""
    names = ("plain", *DRAFTS)
    starts = {name: start(name, tiny, request.param) for name in names}
    return request.param, serve(engines.child({}), starts)


def test_drafts_change_no_answer(found: tuple[str, dict[str, Found]]) -> None:
    dtype, served = found
    if dtype == "float32":
        # In 16 bits batches of other shapes round otherwise: `vispec verify` judges those.
        assert_same(served)
    assert all(served[kind].served.acceptance() > 0 for kind in DRAFTS)


@pytest.mark.parametrize("kind", DRAFTS)
def test_the_v2_runner_records_graphs(found: tuple[str, dict[str, Found]], kind: str) -> None:
    dtype, served = found
    assert served[kind].runner == "V2"
    graphs = " ".join(served[kind].graphs)
    assert "cudagraph_manager" in graphs or "compiled pieces" in graphs, graphs
    if kind == "tree" and dtype == "bfloat16":
        assert "tree_cudagraph_manager, FULL" in graphs
        assert "verification_cudagraph_manager, FULL" in graphs


def test_without_graphs(here: Child, tiny: TinyStore) -> None:
    starts = {name: start(name, tiny, "float32", enforce_eager=True) for name in SOME}
    served = serve(here, starts)
    assert_same(served)
    assert not any("FULL" in graph for name in SOME for graph in served[name].graphs)


def test_the_v1_runner(engines: Engines, tiny: TinyStore) -> None:
    starts = {name: start(name, tiny, "float32") for name in SOME}
    served = serve(engines.child({"VLLM_USE_V2_MODEL_RUNNER": "0"}), starts)
    assert_same(served)
    assert all(served[name].runner == "V1" for name in SOME)


@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_sleep_of_level_two(here: Child, tiny: TinyStore, kind: str) -> None:
    starts = {kind: start(kind, tiny, "float32", enable_sleep_mode=True)}
    served = serve(here, starts, sleep=True)[kind]
    assert served.after is not None
    assert served.after.outputs() == served.served.outputs()


def test_a_quantized_cache(engines: Engines, tiny: TinyStore) -> None:
    """Where the device has no fp8 attention, plain vLLM is refused too."""
    try:
        serve(engines.child({}), {"plain": start("plain", tiny, "bfloat16", kv_cache_dtype="fp8")})
    except ChildError:
        return
    served = serve(
        engines.child({}), {"chain": start("chain", tiny, "bfloat16", kv_cache_dtype="fp8")}
    )
    assert served["chain"].served.acceptance() > 0


def test_a_target_served_without_images(here: Child, tiny: TinyStore) -> None:
    limits = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
    starts = {name: start(name, tiny, "float32", **limits) for name in SOME}
    assert_same(serve(here, starts, text_only=True))
