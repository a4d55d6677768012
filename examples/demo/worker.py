"""The engine process of a comparison: reads requests on stdin, writes answers to stdout.

Started by :class:`examples.demo.side.Side`. The engine lives in this very process and works only
while it is asked, so two of these can wait beside each other without disturbing a measurement.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from examples.demo.job import Answer, Job
from examples.pair import has_gpu
from examples.tiny_vlm.samples import demo_samples
from vllm_vispec.utils.process import serve_requests


class Engine:
    """A running ``vllm.LLM`` and the samples of its job."""

    def __init__(self, job: Job) -> None:
        from vllm import LLM

        self.job = job
        self.samples = list(demo_samples(job.per_family, job.families or None))
        self.llm: Any = LLM(**job.llm_kwargs(), enforce_eager=not has_gpu())

    def answer(self, index: int) -> Answer:
        """Answer a sample greedily, alone in its batch, and time it."""
        from vllm import SamplingParams

        messages = self.samples[index].chat_messages()
        params = SamplingParams(temperature=0.0, max_tokens=self.job.max_tokens)
        begin = time.perf_counter()
        output = self.llm.chat([messages], params, use_tqdm=False)[0]
        wall_seconds = time.perf_counter() - begin
        sequence, stats = output.outputs[0], output.metrics
        metrics = sequence.spec_decode_metrics
        return Answer(
            token_ids=tuple(sequence.token_ids),
            pieces=tuple(self._pieces(sequence.token_ids)),
            per_step_accepted=tuple(metrics.per_step_accepted) if metrics else (),
            decode_seconds=stats.last_token_ts - stats.first_token_ts,
            wall_seconds=wall_seconds,
        )

    def _pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Split the text at the tokens; half a character waits for its other half."""
        tokenizer = self.llm.get_tokenizer()
        pieces, done = [], ""
        for end in range(1, len(token_ids) + 1):
            text = tokenizer.decode(token_ids[:end], skip_special_tokens=True)
            waits = text.endswith("\ufffd") and end < len(token_ids)
            pieces.append("" if waits else text[len(done) :])
            done = done if waits else text
        return pieces


def serve() -> None:
    """Build the engine of the first line, then answer line by line until stdin ends."""
    engines: list[Engine] = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if engines:
            return asdict(engines[0].answer(request["sample"]))
        begin = time.perf_counter()
        engines.append(Engine(Job.from_json(request)))
        return {"ready": time.perf_counter() - begin}

    serve_requests(answer)
    for engine in engines:
        engine.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    serve()
