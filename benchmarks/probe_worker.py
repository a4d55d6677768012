"""An engine process like the demo's that also reports what each decoding round spent where."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.round_probe import RoundProbe
from examples.demo.job import Job
from examples.demo.worker import Engine, serve

CLOCK_VARIABLE = "VISPEC_BENCH_CLOCK"


class ProbedEngine(Engine):
    """Answers with the rounds' times instead of the text."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        core = self.llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        self._probe = RoundProbe(runner, os.environ.get(CLOCK_VARIABLE, "wall"))

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a sample; returns ``rounds``, seconds by part."""
        self.answer(request["sample"])
        return {"rounds": self._probe.take(self.job.num_speculative_tokens)}


if __name__ == "__main__":
    serve(ProbedEngine)
