"""Child-process job for engines whose workers are processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.engine.workloads import as_json, drive, mixed_requests
from tests.support import engine


def serve(kind: str, runs: dict[str, dict[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """Serve ``count`` mixed requests with each run's engine options."""
    for name, options in runs.items():
        with engine.engine(engine.EngineOptions(**options)) as llm:
            results = drive(llm, mixed_requests(kind, count))
            drafts = engine.metric_value(llm, "vllm:spec_decode_num_drafts")
            metrics = {"vllm:spec_decode_num_drafts": drafts}
            yield {"name": name, "results": as_json(results), "metrics": metrics}
