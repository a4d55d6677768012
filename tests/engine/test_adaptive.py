"""Adaptive verification on V2: drafts are cut on the device, ours stay what they are without it.

vLLM offers it with full CUDA graphs alone: it profiles them for its cost tables and copies
confidences on a second stream. None of that decides where drafts are cut: the manager, its choice
of drafts on the device, the runner and the sampler are vLLM's own here, what needs a GPU is not.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.comparison import compare, serve_cold
from tests.support.engine import StartEngine, StartProcess
from tests.support.runners import runners
from tests.support.spies import model_runner
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import Served, mixed_requests, serve_requests

if TYPE_CHECKING:
    import torch
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

TOLERANCE = 1e-4
# Of a pass without tokens, in the cost of a token: about half of the drafts are worth it.
COST = 4.0
# Every other one shows images, so that neighbours' rows differ.
REQUESTS = mixed_requests(KIND, 6, 18, seed=6)


PATH = {"policy": "spec_llava", "depth": 2, "top_k": 1, "threshold": 0.5}


@pytest.mark.parametrize("tree", [None, PATH], ids=["chain", "path"])
@pytest.mark.parametrize("runner", runners("v2", slow=["v2"]))
def test_adaptive_verification(
    engine: StartEngine,
    child: StartProcess,
    tiny: TinyStore,
    runner: str,
    tree: dict[str, Any] | None,
) -> None:
    options: dict[str, Any] = {"max_num_batched_tokens": 128, "max_num_seqs": 8}
    plain = engine(runner, **options).once(serve_requests, REQUESTS)
    options |= {"draft": tiny.head(), "num_draft_tokens": 3, "tree": tree}
    cold = engine(runner, **options).run(serve_cold, REQUESTS)
    child(runner, process="adaptive").call(_replace_what_needs_a_gpu)
    adaptive = engine(
        runner, process="adaptive", **options, config={"enable_adaptive_verification": True}
    )
    adaptive.run(_prepare)
    compared = {}
    for unmoved in (False, True):
        adaptive.run(_start_counting, unmoved)
        compared[unmoved] = found = compare(cold, adaptive, "together", REQUESTS)
        cut, moved, drafted, verified = adaptive.run(_counts)
        assert Served(found.results).outputs() == plain.outputs()
        if not unmoved:
            # Batches were cut unevenly.
            assert moved >= 5
            assert cut >= moved
            assert 0 < verified < drafted
    for name, row in compared[False].requests.items():
        assert row.shared >= 5, name
        assert row.gap < TOLERANCE, name
    assert compared[False].table["misses"] == 0
    # The control: with the host's borders, some requests draft with another one's image.
    assert max(row.gap for row in compared[True].requests.values()) > 100 * TOLERANCE


# What follows runs in the child.


class NoStream:
    """Stands in for a CUDA stream or event: on a CPU all is done when it returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...


def _replace_what_needs_a_gpu() -> None:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.spec_decode import adaptive_verification as module

    def create(enable_adaptive_verification: bool, **kwargs: Any) -> Any:
        if not enable_adaptive_verification:
            return None
        names = ("req_states", "query_start_loc", "num_bonus_tokens", "max_total_logits")
        return module.AdaptiveVerificationManager(**{name: kwargs[name] for name in names})

    VllmConfig._validate_adaptive_verification = lambda self: None
    model_runner.maybe_create_adaptive_verification_manager = create
    model_runner.resolve_adaptive_cudagraph_mode = lambda mode, **_: mode
    module._assign_draft_token_budget_compiled = module._assign_draft_token_budget
    module.stream = lambda *_: nullcontext()
    torch.cuda.Stream = torch.cuda.Event = NoStream
    torch.cuda.current_stream = NoStream


_counted = [0, 0, 0, 0]


def _prepare(llm: LLM) -> None:
    """Give the manager its tables and arbitrary confidences."""
    import numpy as np
    import torch

    manager = model_runner(llm).adaptive_verification
    states = manager.req_states
    manager.cost_tables = (
        np.zeros(states.max_num_reqs + 1),
        COST + np.arange(states.max_num_batched_tokens + 1, dtype=np.float64),
    )
    record, generator = manager.record_confidences, torch.Generator().manual_seed(0)

    def record_arbitrary(confidences: torch.Tensor, batch: Any) -> None:
        record(torch.rand(confidences.shape, generator=generator), batch)

    manager.record_confidences = record_arbitrary


def _start_counting(llm: LLM, unmoved: bool) -> None:
    """Count the batches that are cut unevenly; ``unmoved`` leaves out our part in it."""
    import torch

    v2: Any = importlib.import_module("vllm_vispec.spec_decode.speculator")
    moved_rows = getattr(v2.moved_rows, "original", v2.moved_rows)
    _counted[:] = [0, 0, 0, 0]

    def spy(batch: Any) -> torch.Tensor | None:
        rows = moved_rows(batch)
        starts = torch.from_numpy(batch.query_start_loc_np[: batch.num_reqs + 1])
        _counted[0] += rows is not None
        _counted[1] += not torch.equal(starts, batch.query_start_loc[: batch.num_reqs + 1])
        if batch.num_draft_tokens_per_req is not None:
            _counted[2] += int(batch.num_draft_tokens_per_req.sum())
            _counted[3] += batch.num_draft_tokens
        return None if unmoved else rows

    v2.moved_rows = spy
    v2.moved_rows.original = moved_rows


def _counts(llm: LLM) -> list[int]:
    return _counted
