"""Child-process job: serve a trained head by its own folder, beside its target alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.support import engine

PROMPTS = ("the cat sees a red ball", "two blue boxes near trees")


def serve(target: str, head: str) -> Iterator[dict[str, Any]]:
    """Answer with plain vLLM, then with ``LLM(model=head)``, which finds its target by itself."""
    engine.register_plugin()
    for model in (target, head):
        with engine.engine(engine.EngineOptions(model=model)) as llm:
            found = engine.generate(llm, PROMPTS, engine.greedy(24))
            drafts = engine.metric_value(llm, "vllm:spec_decode_num_drafts")
            yield {"token_ids": [item.token_ids for item in found], "drafts": drafts}
