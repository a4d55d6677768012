"""The engine process of this benchmark: answers several samples in one call, at any temperature."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from examples.demo.worker import Engine, chat_messages, serve
from vllm_vispec.evaluate.engine import inside_answer
from vllm_vispec.trees.memory import tree_memory


class BatchEngine(Engine):
    """An engine whose requests name samples and a temperature, or ask for its memory."""

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer samples that arrive together, or say what the engine's tree takes.

        Returns:
            For each sample its token ids and the accepted draft tokens of its rounds, those behind
            its end left out; seconds of the whole call; seconds from the first token of the first
            answer to the last token of the last one.
        """
        if "memory" in request:
            return {"memory": self.llm.collective_rpc(memory_of)[0]}
        samples: list[int] = request["samples"]
        messages = [chat_messages(self.samples[sample]) for sample in samples]
        begin = time.perf_counter()
        outputs = self.llm.chat(
            messages, self._params(samples, request["temperature"]), use_tqdm=False
        )
        wall_seconds = time.perf_counter() - begin
        stats = [output.metrics for output in outputs]
        first = min(one.first_token_ts for one in stats)
        return {
            "answers": [_answer(output.outputs[0]) for output in outputs],
            "decode_seconds": max(one.last_token_ts for one in stats) - first,
            "wall_seconds": wall_seconds,
        }

    def _params(self, samples: Sequence[int], temperature: float) -> list[Any]:
        from vllm import SamplingParams

        return [
            SamplingParams(temperature=temperature, seed=sample, max_tokens=self.job.max_tokens)
            for sample in samples
        ]


def memory_of(worker: Any) -> dict[str, float] | None:
    """Return the fields of `sides.Memory` for vLLM's worker; None without a tree."""
    found = tree_memory(worker.vllm_config)
    if found is None:
        return None
    return {"kv_percent": found.kv_percent, "buffers_mib": found.num_bytes / 2**20}


def _answer(sequence: Any) -> dict[str, Any]:
    rounds = sequence.spec_decode_metrics
    accepted = rounds.per_step_accepted if rounds else ()
    token_ids = list(sequence.token_ids)
    return {"token_ids": token_ids, "accepted": inside_answer(accepted, len(token_ids))}


if __name__ == "__main__":
    serve(BatchEngine)
