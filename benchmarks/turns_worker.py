"""The engine's process of `benchmarks.turns`: answers several samples in one call."""

from __future__ import annotations

import time
from typing import Any

from examples.tiny_vlm.samples import demo_samples
from vllm_vispec.evaluate.engine import inside_answer
from vllm_vispec.trees.attention import tree_memory
from vllm_vispec.utils.process import serve_requests


class Worker:
    """A running ``vllm.LLM`` and its samples; the first request says which."""

    llm: Any

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Start, say what the engine's tree takes, or answer samples that arrive together."""
        if "llm" in request:
            return self._start(request)
        if "memory" in request:
            return {"memory": self.llm.collective_rpc(memory_of)[0]}
        from vllm import SamplingParams

        samples, temperature = request["samples"], request["temperature"]
        params = [
            SamplingParams(temperature=temperature, seed=sample, max_tokens=self.max_tokens)
            for sample in samples
        ]
        messages = [self.samples[sample].chat_messages() for sample in samples]
        begin = time.perf_counter()
        outputs = self.llm.chat(messages, params, use_tqdm=False)
        wall_seconds = time.perf_counter() - begin
        stats = [output.metrics for output in outputs]
        first = min(one.first_token_ts for one in stats)
        answers = [output.outputs[0] for output in outputs]
        return {
            "token_ids": [list(answer.token_ids) for answer in answers],
            "accepted": [_accepted(answer) for answer in answers],
            "decode_seconds": max(one.last_token_ts for one in stats) - first,
            "wall_seconds": wall_seconds,
        }

    def _start(self, request: dict[str, Any]) -> dict[str, Any]:
        import torch
        from vllm import LLM

        self.max_tokens = request["max_tokens"]
        families = tuple(request["families"]) or None
        self.samples = list(demo_samples(request["per_family"], families))
        self.llm = LLM(**request["llm"], enforce_eager=not torch.cuda.is_available())
        return {"samples": len(self.samples)}


def memory_of(worker: Any) -> dict[str, float] | None:
    """Return the fields of `turns.Memory` for vLLM's worker; None without a tree."""
    found = tree_memory(worker.vllm_config)
    if found is None:
        return None
    return {"kv_percent": found.kv_percent, "buffers_mib": found.num_bytes / 2**20}


def _accepted(answer: Any) -> list[int]:
    steps = answer.spec_decode_metrics
    accepted = steps.per_step_accepted if steps else ()
    return inside_answer(accepted, len(answer.token_ids))


if __name__ == "__main__":
    worker = Worker()
    serve_requests(worker.answer)
    worker.llm.llm_engine.engine_core.shutdown()
