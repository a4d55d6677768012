"""Child-process jobs: engines of a vLLM from which one of the model runners is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from tests.engine.workloads import as_json, drive, mixed_requests
from tests.support import draft_logits, engine

VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"


def serve(
    kind: str, options: dict[str, Any], trees: list[dict[str, Any]], gone: list[str]
) -> Iterator[dict[str, Any]]:
    """Serve requests plainly, with a head and with trees; then ask for the other model runner.

    Args:
        kind: The target's.
        options: Of an engine with a head.
        trees: What trees add to these.
        gone: Modules that this vLLM must not have.
    """
    engine.prepare_process()
    assert [name for name in gone if find_spec(name) is not None] == []
    requests = mixed_requests(kind, 6, 12)
    with engine.engine(engine.EngineOptions(**options | {"draft": None})) as llm:
        yield {"name": "plain", "outputs": as_json(drive(llm, requests))}
    for index, tree in enumerate([{}, *trees]):
        with engine.engine(engine.EngineOptions(**options | tree)) as llm:
            drafter = type(draft_logits.drafter(llm)).__name__
            name = f"tree {index}" if index else "chain"
            yield {"name": name, "outputs": as_json(drive(llm, requests)), "drafter": drafter}
    try:
        _ask_for_the_other(engine.EngineOptions(**options).llm_kwargs())
    except Exception as error:
        yield {"name": "other", "error": type(error).__name__, "message": str(error)}


def _ask_for_the_other(arguments: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_vispec.compat.check import require
    from vllm_vispec.spec_decode.patch_points import CHAINS

    if os.environ[VARIABLE] == "0":
        # Without Triton vLLM itself refuses V2 here, before we are asked.
        require(CHAINS)
    os.environ[VARIABLE] = "0"
    EngineArgs(**arguments).create_engine_config()
