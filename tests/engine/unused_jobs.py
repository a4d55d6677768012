"""Child-process jobs that look at vLLM before and after the plugin is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from tests.engine.workloads import as_json, drive, mixed_requests
from tests.support import draft_logits, engine

PROPOSERS = ("vllm_vispec.v1.proposer", "vllm_vispec.spec_decode.speculator")
"""Modules that only an engine with a ViSpec head may import."""


def _import_vllm() -> None:
    """Import what the plugin touches or looks at, so that loading it imports little more."""
    import vllm.engine.arg_utils
    import vllm.model_executor.models.registry
    import vllm.transformers_utils.config
    import vllm.v1.spec_decode.eagle
    import vllm.v1.worker.gpu_worker  # noqa: F401


def _snapshot() -> dict[str, Any]:
    """Return every attribute of vLLM's loaded modules and classes by dotted name."""
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith("vllm.") or not isinstance(module, ModuleType):
            continue
        for key, value in list(vars(module).items()):
            # Importing a submodule sets it on its package; that is no change of ours.
            if isinstance(value, ModuleType) or key.startswith("__"):
                continue
            found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}.{key}.{attr}": item for attr, item in vars(value).items()}
            elif isinstance(value, dict):
                found[f"{name}.{key}()"] = dict(value)
    return found


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names whose objects are not the same any more; lazily filled caches apart."""
    changed = []
    for name, value in before.items():
        now = after.get(name)
        same = now == value if name.endswith("()") else now is value
        if not same and not name.endswith((".__dict__", "__weakref__")):
            changed.append(name)
    return sorted(changed)


def register_twice() -> dict[str, Any]:
    """Load the plugin twice and report what changed each time."""
    _import_vllm()
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils import config

    from vllm_vispec.plugin import find_problem, register

    assert find_problem() is None  # imports what the check needs
    archs, parsers = (
        set(ModelRegistry.get_supported_archs()),
        dict(config._CONFIG_FORMAT_TO_CONFIG_PARSER),
    )
    start = _snapshot()
    register()
    once = _snapshot()
    register()
    return {
        "first": _changes(start, once),
        "second": _changes(once, _snapshot()),
        "added": sorted(set(ModelRegistry.get_supported_archs()) - archs),
        "parsers_same": dict(config._CONFIG_FORMAT_TO_CONFIG_PARSER) == parsers,
    }


def serve(kind: str, runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Serve the text requests of a mixed batch, for ``kind``'s own target all of it.

    Yields the outputs and how each engine looks.
    """
    requests = mixed_requests(kind, 16)
    for options in runs:
        with engine.engine(engine.EngineOptions(**options)) as llm:
            takes_images = llm.llm_engine.model_config.is_multimodal_model
            chosen = [item for item in requests if takes_images or not item.images]
            yield _looks(llm) | {"outputs": as_json(drive(llm, chosen))}


def _looks(llm: Any) -> dict[str, Any]:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.spec_decode.eagle import EagleProposer
    from vllm.v1.worker.worker_base import WorkerBase

    runner = draft_logits.model_runner(llm)
    drafter = getattr(runner, "drafter", None)
    return {
        "wrapped": [
            hasattr(function, "__wrapped__")
            for function in (EngineArgs.create_speculative_config, WorkerBase.__init__)
        ],
        "own_new": "__new__" in vars(EagleProposer),
        "drafter": type(drafter).__name__ if drafter is not None else None,
        "engine_modules": [name for name in PROPOSERS if name in sys.modules],
    }
