"""A child-process job: requests with seeds of their own, at temperatures above zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.engine.workloads import Request, as_json, drive, image_text, words
from tests.support import engine

TEMPERATURES = (0.0, 0.4, 0.8, 1.2)


def sample_with_seeds(
    kind: str, setups: list[dict[str, Any]], count: int, max_tokens: int
) -> Iterator[dict[str, Any]]:
    """Serve the same ``count`` seeded requests at once from each setup's engine."""
    requests = [
        Request(
            f"seed-{i}",
            f"{image_text(kind, 1)} {words(i, 6)}",
            (i,),
            max_tokens,
            # No top_p: vLLM's kernel for it does not run under Triton's interpreter.
            {"temperature": TEMPERATURES[i % len(TEMPERATURES)], "seed": i},
        )
        for i in range(count)
    ]
    for setup in setups:
        with engine.engine(engine.EngineOptions(**setup["options"])) as llm:
            yield {"name": setup["name"], "results": as_json(drive(llm, requests))}
