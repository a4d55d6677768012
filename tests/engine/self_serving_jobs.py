"""Child-process jobs: heads that are served by their own folder's name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.engine.workloads import as_json, drive, mixed_requests
from tests.support import draft_logits, engine


def resolve(cases: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Ask vLLM's argument handling what it would serve for each case's model and settings."""
    engine.prepare_process()
    engine.register_plugin()
    from vllm.engine import arg_utils

    for name, case in cases.items():
        try:
            model, tokenizer, settings = arg_utils.maybe_override_with_speculators(
                model=case["model"],
                tokenizer=case.get("tokenizer"),
                revision=None,
                trust_remote_code=False,
                vllm_speculative_config=case.get("settings"),
                hf_token=None,
            )
        except Exception as error:
            yield {"name": name, "error": str(error), "kind": type(error).__name__}
        else:
            yield {"name": name, "model": model, "tokenizer": tokenizer, "settings": settings}


def serve(kind: str, runs: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Serve a mixed batch with each run's engine options; yields outputs and how it was served."""
    engine.prepare_process()
    engine.register_plugin()
    requests = mixed_requests(kind, 6, 16)
    for name, options in runs.items():
        with engine.engine(engine.EngineOptions(**options)) as llm:
            results = drive(llm, requests)
            yield {
                "name": name,
                "results": as_json(results),
                "model": llm.llm_engine.model_config.model,
                "drafter": type(draft_logits.drafter(llm)).__name__,
            }
