"""A child-process job: engines lose what vLLM does not keep over a sleep of level 2.

There is no sleep mode on CPUs.  What it does is done by hand here: vLLM saves and restores the
buffers of target and draft; weights are loaded anew, as users of level 2 do; all other memory that
was allocated while models were loaded comes back with anything in it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn

from tests.engine.workloads import as_json, drive, mixed_requests
from tests.support import draft_logits, engine

if TYPE_CHECKING:
    from vllm import LLM

GARBAGE = 77


def sleep_and_wake(
    kind: str, setups: list[dict[str, Any]], count: int, max_tokens: int
) -> Iterator[dict[str, Any]]:
    """Serve the same requests before and after a sleep, from each setup's engine."""
    requests = mixed_requests(kind, count, max_tokens)
    for setup in setups:
        with _noting_loaded() as loaded, engine.engine(_options(setup)) as llm:
            before = drive(llm, requests)
            lost = lose(llm, loaded)
            loaded.clear()
            assert llm.llm_engine.reset_prefix_cache()
            after = drive(llm, requests)
            yield {
                "name": setup["name"],
                "before": as_json(before),
                "results": as_json(after),
                "lost": lost,
            }


def _options(setup: Mapping[str, Any]) -> engine.EngineOptions:
    return engine.EngineOptions(**setup["options"])


@contextmanager
def _noting_loaded() -> Iterator[list[torch.Tensor]]:
    """Yield what will hold all tensors that exist after models were loaded and not before."""
    engine.prepare_process()
    from vllm.v1.worker.gpu_worker import Worker

    original = Worker.load_model
    loaded: list[torch.Tensor] = []

    def load_model(worker: Any, *args: Any, **kwargs: Any) -> Any:
        known = {_address(tensor) for tensor in _all_tensors()}
        result = original(worker, *args, **kwargs)
        loaded.extend(tensor for tensor in _all_tensors() if _address(tensor) not in known)
        return result

    with mock.patch.object(Worker, "load_model", load_model):
        yield loaded


def _all_tensors() -> list[torch.Tensor]:
    gc.collect()
    found = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return [tensor for tensor in found if tensor.device.type == "cpu" and tensor.numel()]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@torch.inference_mode()
def lose(llm: LLM, loaded: list[torch.Tensor]) -> list[list[Any]]:
    """Overwrite everything that was loaded; restore what vLLM and its users restore.

    Returns:
        Shape and dtype of what is lost.
    """
    runner = draft_logits.model_runner(llm)
    models = [runner.get_model(), runner.get_draft_model()]
    saved = [(tensor, tensor.clone()) for model in models if model for tensor in _kept(model)]
    kept = {_address(tensor) for tensor, _ in saved}
    # vLLM's CPU matrix products keep pointers in tensors, which are no device's memory.
    pointers = {
        _address(item.handler_tensor)
        for item in gc.get_objects()
        if type(item).__name__ == "CPUDNNLGEMMHandler"
    }
    lost = []
    for tensor in loaded:
        if _address(tensor) in kept | pointers:
            continue
        lost.append([list(tensor.shape), str(tensor.dtype)])
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
    return lost


def _kept(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
