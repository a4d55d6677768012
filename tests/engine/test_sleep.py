"""After a sleep of level 2, whose memory comes back with anything in it, outputs are the same.

There is no sleep mode on CPUs. What it does is done by hand here: vLLM saves and restores the
buffers of target and draft; weights are loaded anew, as users of level 2 do; all other memory that
was allocated while models were loaded comes back with anything in it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.drafts import DRAFTS, Draft
from tests.support.engine import StartEngine, StartProcess
from tests.support.runners import runners
from tests.support.spies import model_runner
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import Served, drive, mixed_requests

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

GARBAGE = 77


# A published model has a tower of its own, and buffers that hide rows of images from it.
SLEEPING = {
    "chain": DRAFTS["chain"],
    "tree": DRAFTS["tree"],
    "sibling": Draft(is_sibling=True),
    "sibling, prune": Draft(options={"config": {"images": "prune:4"}}, is_sibling=True),
    "sibling, none": Draft(options={"config": {"images": "none"}}, is_sibling=True),
}


@pytest.mark.parametrize("draft", SLEEPING)
@pytest.mark.parametrize("runner", runners("v1", "v2", slow=["v1"]))
def test_sleeping_changes_nothing(
    engine: StartEngine, child: StartProcess, tiny: TinyStore, runner: str, draft: str
) -> None:
    child(runner, process="sleep").call(_note_what_models_allocate)
    ours = engine(runner, process="sleep", max_num_batched_tokens=128, **SLEEPING[draft].of(tiny))
    before, after, num_lost = ours.run(_serve_around_a_sleep)
    assert after.outputs() == before.outputs()
    assert after.accepted() == before.accepted()
    assert after.acceptance() > 0
    assert num_lost > 0


# What follows runs in the child.

_loaded: list[torch.Tensor] = []


def _note_what_models_allocate() -> None:
    """Collect all tensors that exist after models were loaded and not before."""
    from vllm.v1.worker.gpu_worker import Worker

    if hasattr(Worker.load_model, "original"):
        return
    original = Worker.load_model

    def load_model(worker: Any, *args: Any, **kwargs: Any) -> Any:
        known = {_address(tensor) for tensor in _all_tensors()}
        result = original(worker, *args, **kwargs)
        _loaded[:] = [tensor for tensor in _all_tensors() if _address(tensor) not in known]
        return result

    load_model.original = original  # type: ignore[attr-defined]
    Worker.load_model = load_model


def _all_tensors() -> list[torch.Tensor]:
    import torch

    gc.collect()
    found = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return [tensor for tensor in found if tensor.device.type == "cpu" and tensor.numel()]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _serve_around_a_sleep(llm: LLM) -> tuple[Served, Served, int]:
    requests = mixed_requests(KIND, 4, 8)
    before = drive(llm, requests)
    num_lost = _lose(llm)
    assert llm.llm_engine.reset_prefix_cache()
    return Served(before), Served(drive(llm, requests)), num_lost


def _lose(llm: LLM) -> int:
    """Overwrite everything that was loaded; restore what vLLM and its users restore.

    Returns:
        The number of tensors that are lost.
    """
    import torch

    models = [model_runner(llm).get_model(), model_runner(llm).get_draft_model()]
    saved = [(tensor, tensor.clone()) for model in models if model for tensor in _kept(model)]
    kept = {_address(tensor) for tensor, _ in saved}
    # vLLM's CPU matrix products keep pointers in tensors, which are no device's memory.
    kept |= {
        _address(item.handler_tensor)
        for item in gc.get_objects()
        if type(item).__name__ == "CPUDNNLGEMMHandler"
    }
    lost = [tensor for tensor in _loaded if _address(tensor) not in kept]
    with torch.inference_mode():
        for tensor in lost:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype == torch.bool:
                tensor.logical_not_()
            else:
                tensor.fill_(GARBAGE)
        for tensor, _ in saved:
            tensor.fill_(GARBAGE)
        for tensor, content in saved:
            tensor.copy_(content)
    _loaded.clear()
    return len(lost)


def _kept(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
