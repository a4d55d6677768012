"""One side's engine, seen from the parent: a child process that answers when asked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from vllm_vispec.bench.load import chat_messages
from vllm_vispec.bench.machine import has_gpu
from vllm_vispec.bench.profile.probes import find_runner
from vllm_vispec.bench.profile.rounds import Found
from vllm_vispec.bench.profile.worker import Job
from vllm_vispec.bench.schema import BenchSample
from vllm_vispec.bench.worker_process import WorkerProcess

WORKER = "vllm_vispec.bench.profile.worker"
START_S = 1800.0


class EngineProcess(WorkerProcess):
    """A context manager around one engine.

    Args:
        side: its name.
        job: what to start.
        log_file: gets everything that the engine says.
    """

    def __init__(self, side: str, job: Job, log_file: Path) -> None:
        super().__init__(side, WORKER, environment(job), log_file)
        self.job = job

    def __enter__(self) -> Self:
        """Start it and wait until it can be asked.

        Raises:
            ViSpecError: it does not start.
        """
        super().__enter__()
        try:
            self.request(self.job.to_json(), START_S)
        except BaseException:
            self.stop()
            raise
        return self

    def ask(self, samples: Sequence[BenchSample]) -> Found:
        """Have samples answered together.

        Raises:
            ViSpecError: an image cannot be read, or the engine fails.
        """
        return Found.from_json(self.request({"do": "ask", **_questions(samples)}))

    def answer(self, sample: BenchSample) -> str:
        """Return the greedy answer to one sample.

        Raises:
            ViSpecError: see `ask`.
        """
        return str(self.request({"do": "answer", **_questions([sample])})["text"])


def environment(job: Job) -> dict[str, str]:
    """Return what an engine's environment has besides a server's: what the profile is about."""
    probe = find_runner(job.runner)
    # The cpu clock counts one thread, so the work has to be on it.
    one_thread = {"OMP_NUM_THREADS": "1"} if job.clock == "cpu" else {}
    return {
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **probe.environment,
        **({} if has_gpu() else probe.on_cpu),
        **one_thread,
    }


def _questions(samples: Sequence[BenchSample]) -> dict[str, Any]:
    return {
        "messages": [chat_messages(sample) for sample in samples],
        "max_tokens": [sample.max_tokens for sample in samples],
    }
