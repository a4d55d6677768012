"""One side's engine, seen from the parent: a child process that answers when asked."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_vispec.bench.environment import server_environment
from vllm_vispec.bench.load import chat_messages
from vllm_vispec.bench.machine import has_gpu
from vllm_vispec.bench.profile.probes import find_runner
from vllm_vispec.bench.profile.rounds import Found
from vllm_vispec.bench.profile.worker import Job
from vllm_vispec.bench.schema import BenchSample
from vllm_vispec.errors import ViSpecError

WORKER = "vllm_vispec.bench.profile.worker"
ROOT = Path(__file__).resolve().parents[3]
START_S, REPLY_S, STOP_S = 1800.0, 3600.0, 30.0
LOG_TAIL = 1500


class EngineProcess:
    """A context manager around one engine.

    Args:
        side: its name.
        job: what to start.
        log_file: gets everything that the engine says.
    """

    def __init__(self, side: str, job: Job, log_file: Path) -> None:
        self.side, self.job, self.log_file = side, job, log_file

    def __enter__(self) -> EngineProcess:
        """Start it and wait until it can be asked.

        Raises:
            ViSpecError: it does not start.
        """
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(self.job),
                # A key press reaches only us; we end the engines in order.
                start_new_session=True,
            )
        try:
            self._request(self.job.to_json(), START_S)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def ask(self, samples: Sequence[BenchSample]) -> Found:
        """Have samples answered together.

        Raises:
            ViSpecError: an image cannot be read, or the engine fails.
        """
        return Found.from_json(self._request({"do": "ask", **_questions(samples)}))

    def answer(self, sample: BenchSample) -> str:
        """Return the greedy answer to one sample.

        Raises:
            ViSpecError: see `ask`.
        """
        return str(self._request({"do": "answer", **_questions([sample])})["text"])

    def _request(self, content: Mapping[str, Any], seconds: float = REPLY_S) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(content).encode() + b"\n")
            stdin.flush()
        # One reply per request, so nothing can wait unseen in the stream's buffer.
        if not select.select([stdout], [], [], seconds)[0]:
            raise self._error(f"did not reply within {seconds:.0f} s")
        line = stdout.readline()
        if not line:
            raise self._error("ended")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ViSpecError(f"{reply['error']} (side {self.side}, log {self.log_file})")
        return reply

    def _error(self, what: str) -> ViSpecError:
        tail = self.log_file.read_text(errors="replace")[-LOG_TAIL:].strip()
        return ViSpecError(
            f"the engine of {self.side} {what}: {tail}\n(all of it in {self.log_file})"
        )

    def _stop(self) -> None:
        process = self._process
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        # The group outlives its leader when a helper process hangs.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_S)
        if process.stdout is not None:
            process.stdout.close()


def environment(job: Job) -> dict[str, str]:
    """Return the engine's environment: the user's, but for what the profile is about."""
    probe = find_runner(job.runner)
    # The cpu clock counts one thread, so the work has to be on it.
    one_thread = {"OMP_NUM_THREADS": "1"} if job.clock == "cpu" else {}
    # At the end, so that another vLLM in front stays in front.
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    return {
        "VLLM_LOGGING_LEVEL": "WARNING",
        **server_environment(),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        **probe.environment,
        **({} if has_gpu() else probe.on_cpu),
        **one_thread,
    }


def _questions(samples: Sequence[BenchSample]) -> dict[str, Any]:
    return {
        "messages": [chat_messages(sample) for sample in samples],
        "max_tokens": [sample.max_tokens for sample in samples],
    }
