"""Child-process job that notes what different copies of a head draft for the same requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.engine.workloads import as_json, drive, mixed_requests
from tests.support import draft_logits, engine


def serve(kind: str, runs: dict[str, dict[str, Any]], count: int = 8) -> Iterator[dict[str, Any]]:
    """Serve a mixed batch with each run's engine options.

    Yields outputs and, by request, position and step, the drafted token with the mean and the
    largest magnitude of its logits.
    """
    requests = mixed_requests(kind, count, 20)
    for name, options in runs.items():
        with engine.engine(engine.EngineOptions(**options)) as llm:
            recorded = draft_logits.record(llm)
            results = drive(llm, requests)
            drafts = {
                f"{request} {position}+{step}": [
                    int(row.argmax()),
                    float(row.mean()),
                    float(row.abs().max()),
                ]
                for (request, position, step), row in recorded.rows.items()
            }
            yield {"name": name, "results": as_json(results), "drafts": drafts}
