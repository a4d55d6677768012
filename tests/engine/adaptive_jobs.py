"""Child-process jobs: adaptive verification on the CPU, with stand-ins for what only a GPU has.

vLLM offers it with full CUDA graphs alone: it profiles them for its cost tables and copies
confidences on a second stream. None of that decides where drafts are cut: the manager, its choice
of drafts on the device, the runner and the sampler are vLLM's own here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from tests.engine.acceptance_jobs import Logits, compare_results, table_stats
from tests.engine.workloads import Request, as_json, drive, drive_one_by_one, mixed_requests
from tests.support import draft_logits, engine

if TYPE_CHECKING:
    import torch
    from vllm import LLM

COST = 4.0
"""Of a pass without tokens, in the cost of a token: about half of the drafts are worth it."""


class NoStream:
    """Stands in for a CUDA stream or event: on a CPU all is done when it returns."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...


def requests_of(kind: str, count: int) -> list[Request]:
    """Return requests of which every other one shows images, so that neighbours' rows differ."""
    return mixed_requests(kind, count, 18, seed=6)


def serve(
    kind: str, options: dict[str, Any], count: int, modes: list[str]
) -> Iterator[dict[str, Any]]:
    """Serve requests alone, then together with adaptive verification in every mode.

    Modes: "adaptive"; "unmoved": the same without our part in it.
    """
    requests = requests_of(kind, count)
    with engine.engine(engine.EngineOptions(**(options | {"draft": None}))) as llm:
        yield {"mode": "plain", "results": as_json(drive(llm, requests))}
    with engine.engine(engine.EngineOptions(**options)) as llm:
        recorded = draft_logits.record(llm)
        cold = drive_one_by_one(llm, requests)
        cold_logits = _rows(recorded, requests)
    _stand_in()
    config = engine.EngineOptions(**options).llm_kwargs()["speculative_config"]
    extra = {"speculative_config": config | {"enable_adaptive_verification": True}}
    for mode in modes:
        with engine.engine(engine.EngineOptions(**(options | {"extra": extra}))) as llm:
            spied = _prepare(llm, mode == "unmoved")
            recorded = draft_logits.record(llm)
            found = drive(llm, requests)
            yield {
                "mode": mode,
                "results": as_json(found),
                "requests": compare_results(cold, cold_logits, found, _rows(recorded, requests)),
                "table": table_stats(llm),
                **spied,
            }


def _rows(recorded: draft_logits.DraftLogits, requests: list[Request]) -> dict[str, Logits]:
    return {one.name: dict(recorded.of_request(one.name)) for one in requests}


def _stand_in() -> None:
    """Replace what needs a GPU."""
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


def _prepare(llm: LLM, unmoved: bool) -> dict[str, Any]:
    """Give the manager its tables and arbitrary confidences; count the batches it cut unevenly."""

    import numpy as np
    import torch

    v2: Any = importlib.import_module("vllm_vispec.spec_decode.speculator")

    manager = draft_logits.model_runner(llm).adaptive_verification
    states = manager.req_states
    manager.cost_tables = (
        np.zeros(states.max_num_reqs + 1),
        COST + np.arange(states.max_num_batched_tokens + 1, dtype=np.float64),
    )
    record, generator = manager.record_confidences, torch.Generator().manual_seed(0)

    def record_arbitrary(confidences: torch.Tensor, batch: Any) -> None:
        record(torch.rand(confidences.shape, generator=generator), batch)

    manager.record_confidences = record_arbitrary
    moved_rows = getattr(v2.moved_rows, "original", v2.moved_rows)
    spied = {"cut": 0, "moved": 0, "drafted": 0, "verified": 0}

    def spy(batch: Any) -> torch.Tensor | None:
        rows = moved_rows(batch)
        if batch.num_draft_tokens_per_req is not None:
            spied["drafted"] += int(batch.num_draft_tokens_per_req.sum())
            spied["verified"] += batch.num_draft_tokens
        spied["cut"] += rows is not None
        starts = torch.from_numpy(batch.query_start_loc_np[: batch.num_reqs + 1])
        spied["moved"] += not torch.equal(starts, batch.query_start_loc[: batch.num_reqs + 1])
        return None if unmoved else rows

    v2.moved_rows = spy
    v2.moved_rows.original = moved_rows
    return spied
