"""Engines start as GPUs start them: a memory profile, compiled models, bf16, vLLM's caches.

Each kind of draft starts once that way on both runners and releases, and answers what the eager
engine of the same dtype with a given KV cache answers. The models' graphs are traced by dynamo and
run as they are, so results are the same to the last bit: tokens, drafts and acceptance are compared
strictly, in bf16 too.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.child import Child
from tests.support.drafts import DRAFTS, start_options, start_requests
from tests.support.engine import Engine, EngineOptions, StartEngine
from tests.support.runners import RUNNERS, environment, marks
from tests.support.spies import drafter, model_runner, watch_drafts
from tests.support.tiny_store import TinyStore
from tests.support.workloads import Served, serve_requests

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

GPU: Mapping[str, Any] = {"compiler": "eager", "memory_profile": True, "dtype": "bfloat16"}
# Engines that compile leave norms and activations to the compiler, others have kernels for them.
UNCOMPILED: Mapping[str, Any] = {"compilation_config": {"custom_ops": ["none"]}}
COMPILED = {"draft_vlm": "DraftVlmModel", "no_compress": "EmbedsModel"}
# On V1 in the default set: those whose models differ, and a tree.
DEFAULT = ("chain", "tree", "draft_vlm", "no_compress")


@dataclass(frozen=True)
class Start:
    """What an engine answered and drafted, and how it was started.

    Attributes:
        compiled: Names of the classes of modules that were; ``loaded`` those among them that vLLM
            took from its cache.
        kv_cache_given: Whether the size of the KV cache was given, not found by a profile.
    """

    served: Served
    drafts: list[list[list[int]]]
    compiled: list[str]
    loaded: list[str]
    dtype: str
    kv_cache_given: bool


@pytest.mark.parametrize(
    ("runner", "kind"),
    [
        pytest.param(name, kind, id=f"{name}-{kind}", marks=marks(name, slow))
        for name in RUNNERS
        for kind in DRAFTS
        for slow in [name == "v2" or (name == "v1" and kind not in DEFAULT)]
    ],
)
def test_starts_as_on_a_gpu(engine: StartEngine, tiny: TinyStore, runner: str, kind: str) -> None:
    options = start_options(tiny, kind)
    eager: Start = engine(runner, **options, dtype="bfloat16", **UNCOMPILED).run(serve_and_look)
    found: Start = engine(runner, **options, **GPU).run(serve_and_look)
    assert eager.kv_cache_given
    assert eager.compiled == []
    assert not found.kv_cache_given
    assert found.dtype == "torch.bfloat16"
    assert COMPILED.get(kind, "ViSpecModel") in found.compiled
    assert len(found.compiled) == 2
    assert_same_start(eager, found)


# A process each, with (engine, compiler); they share vLLM's cache, and the head in its folder is
# trained further before the third. "piecewise" is what GPUs do by default: vLLM loads what the
# first process compiled. "inductor" is the CPU's default, where vLLM 0.32 and 0.33 write artefacts
# that they cannot load (a warning says so, without a head too) and compile again.
PROCESSES: Mapping[str, tuple[tuple[str, str | None], ...]] = {
    "eager": (("chain", None), ("tree", None)),
    "eager-others": (("head", None), ("table", None)),
    "first": (("chain", "piecewise"), ("tree", "piecewise"), ("chain", "inductor")),
    "second": (("chain", "piecewise"), ("chain", "inductor")),
    "third": (("head", "piecewise"), ("table", "piecewise")),
}
OTHER_WEIGHTS = ("eager-others", "third")


@pytest.mark.slow
def test_restarts(tiny: TinyStore, tmp_path: Path) -> None:
    """Engines start with what earlier ones compiled, and answer what eager ones answer (fp32)."""
    env = environment("v1") | {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    found: dict[tuple[str, str, str | None], Start] = {}
    logs = {}
    for process, engines in PROCESSES.items():
        others: dict[str, Any] = {"seed": 3, "noise": 1.5} if process in OTHER_WEIGHTS else {}
        shutil.copytree(tiny.head(**others), tmp_path / "head", dirs_exist_ok=True)
        child = Child(env)
        for name, compiler in engines:
            options = start_options(tiny, "tree" if name == "tree" else "chain")
            options |= {"model": str(tiny.target()), "draft": str(tmp_path / "head")}
            options |= {"config": {"image_table_size": 3}} if name == "table" else {}
            options |= {"compiler": compiler, "memory_profile": compiler is not None}
            handle = Engine(child, process, EngineOptions.of(**options), "", {})
            found[process, name, compiler] = handle.run(serve_and_look)
        logs[process] = child.log()
        child.close()
    for (process, name, compiler), start in found.items():
        if compiler is not None:
            eager = "eager-others" if process in OTHER_WEIGHTS else "eager"
            assert len(start.compiled) == 2
            assert not start.kv_cache_given
            assert_same_start(found[eager, name, None], start)
            assert "vllm" in logs[process]
            assert "Traceback" not in logs[process]
            assert "Exception ignored" not in logs[process]
    first = found["first", "chain", "piecewise"]
    other = found["third", "head", "piecewise"]
    assert first.loaded == []
    assert found["second", "chain", "piecewise"].loaded == ["Qwen2Model", "ViSpecModel"]
    # Weights are no part of an artefact; drafts are those of the head that is served.
    assert other.loaded == ["Qwen2Model", "ViSpecModel"]
    assert first.drafts != other.drafts
    # Another table compiles anew.
    assert found["third", "table", "piecewise"].loaded == []


def assert_same_start(eager: Start, found: Start) -> None:
    """Same tokens, same drafts, and as many of them accepted in every step."""
    assert found.served.outputs() == eager.served.outputs()
    assert found.drafts == eager.drafts
    assert found.served.accepted() == eager.served.accepted()
    assert found.served.acceptance() > 0


def serve_and_look(llm: LLM) -> Start:
    """Serve :func:`start_requests` (in the engine's process)."""
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper as Compiled

    with watch_drafts(llm) as drafts:
        served = serve_requests(llm, start_requests())
    config, models = llm.llm_engine.vllm_config, [model_runner(llm).get_model(), drafter(llm).model]
    used = [
        one
        for model in models
        for one in model.modules()
        if isinstance(one, Compiled)
        and not one.do_not_compile
        and (one.compiled or getattr(one, "aot_compiled_fn", None))
    ]
    loaded = [one for one in used if one.was_aot_compile_fn_loaded_from_disk]
    return Start(
        served,
        drafts,
        sorted(type(one).__name__ for one in used),
        sorted(type(one).__name__ for one in loaded),
        str(config.model_config.dtype),
        config.cache_config.kv_cache_memory_bytes is not None,
    )
