"""One side of a comparison: an engine in a child process that answers when asked."""

from __future__ import annotations

import os
from pathlib import Path

from examples.demo.job import Answer, Job
from examples.pair import ENVIRONMENT
from vllm_vispec.utils.engine_start import why
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.process import WorkerProcess

START_SECONDS = 900.0
REPLY_SECONDS = 600.0


class Side(WorkerProcess):
    """A context manager around one engine process.

    Args:
        name: What errors call it.
        job: The engine's settings.
        log_file: Receives everything the process prints.
        threads: OpenMP threads of the engine.
    """

    def __init__(self, name: str, job: Job, log_file: Path, threads: int = 1) -> None:
        engine_in_process = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(threads),
        }
        environment = ENVIRONMENT | dict(os.environ) | engine_in_process
        super().__init__(name, "examples.demo.worker", environment, log_file)
        self.job = job
        self.start_seconds = 0.0

    def begin(self) -> None:
        """Start the engine."""
        self.start_seconds = self.request(self.job.to_json(), START_SECONDS)["ready"]

    def answer(self, sample: int) -> Answer:
        """Have one sample answered."""
        return Answer.from_json(self.request({"sample": sample}, REPLY_SECONDS))

    def error(self, what: str) -> ViSpecError:
        """Return the error of an engine that cannot be asked any more."""
        reason = why(self.log(), lambda name, value: f"{name}={value}")
        return ViSpecError(f"the {self.name} engine {what}: {reason} (log: {self.log_file})")
