"""Child-process jobs: engines with vLLM's defaults on whatever device is here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.engine.start_jobs import requests
from tests.engine.workloads import as_json, drive
from tests.support import draft_logits
from tests.support.engine import prepare_process, register_plugin, shut_down_distributed

EXTENSION = "vllm_vispec.verify.worker_extension.VerifyWorker"


def serve(kind: str, starts: list[dict[str, Any]], max_tokens: int = 16) -> Iterator[Any]:
    """Start one engine per item of ``starts`` and serve the same requests with each.

    A start has a ``name`` and ``arguments`` of ``vllm.LLM``; with ``sleep`` its engine sleeps at
    level 2, wakes up with its weights read again, and serves them a second time; with
    ``text_only`` requests with images are left out.
    """
    prepare_process()
    register_plugin()
    from vllm import LLM

    for start in starts:
        arguments = start["arguments"] | {"worker_extension_cls": EXTENSION, "seed": 0}
        if "speculative_config" in arguments:
            arguments["per_request_spec_decode_metrics"] = "detailed"
        wanted = requests(kind, max_tokens)
        if start.get("text_only"):
            wanted = [request for request in wanted if not request.images]
        llm = LLM(disable_log_stats=False, **arguments)
        try:
            found = {"name": start["name"], "results": as_json(drive(llm, wanted))}
            (state,) = llm.collective_rpc("vispec_state")
            found["runner"], found["graphs"] = state["runner"], state["graphs"]
            if start.get("sleep"):
                _sleep_and_wake(llm)
                found["after"] = as_json(drive(llm, wanted))
        finally:
            llm.llm_engine.engine_core.shutdown()
        del llm
        shut_down_distributed()
        yield found


def _sleep_and_wake(llm: Any) -> None:
    """Lose weights and KV cache, as users of reinforcement learning do between two updates."""
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    _load_draft_again(llm)
    llm.wake_up(tags=["kv_cache"])


def _load_draft_again(llm: Any) -> None:
    """Read the draft's weights again, which vLLM's ``reload_weights`` leaves out."""
    from vllm.model_executor.model_loader import get_model_loader

    drafter, config = draft_logits.drafter(llm), llm.llm_engine.vllm_config
    draft_config = config.speculative_config.draft_model_config
    get_model_loader(config.load_config).load_weights(drafter.model, draft_config)
