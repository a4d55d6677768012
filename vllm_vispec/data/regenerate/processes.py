"""Several engines on one machine: a process for each, on GPUs of its own.

Each takes the next dialogue when its engine has room for it. What a process that died had taken is
missing at the end; the same command makes it.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing import get_context, parent_process
from queue import Empty
from threading import Thread
from typing import Any

from vllm_vispec.data.regenerate.dialogue import Result
from vllm_vispec.data.regenerate.offline import OfflineBackend
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.types import Conversation, Rejected
from vllm_vispec.utils.engine_start import find_cause
from vllm_vispec.utils.errors import ViSpecError


class ProcessesBackend:
    """Hands dialogues to `--workers` processes of this machine."""

    def __init__(self, settings: RegenerateSettings) -> None:
        self.settings = settings
        self._gpus = share_gpus(settings)
        # Started anew: a forked process has no CUDA.
        self._context = get_context("spawn")
        self._workers: list[Any] = []

    def answer(self, conversations: Iterable[Conversation]) -> Iterator[Result]:
        """See `Backend.answer`."""
        todo, results = list(conversations), self._context.Queue()
        taken = self._context.Value("q", 0)
        self._workers = [
            self._context.Process(target=work, args=(self.settings, gpus, todo, taken, results))
            for gpus in self._gpus[: len(todo)]
        ]
        for worker in self._workers:
            worker.start()
        yield from drain(results, self._join, set())

    def close(self) -> None:
        """End processes that still run."""
        for worker in self._workers:
            worker.terminate()

    def _join(self) -> None:
        for worker in self._workers:
            worker.join()
        codes = [worker.exitcode for worker in self._workers if worker.exitcode]
        if codes:
            raise ViSpecError(
                f"{len(codes)} of {len(self._workers)} ended with exit code {codes[0]} (see "
                "above); what is finished is kept: run the same command again"
            )


def work(
    settings: RegenerateSettings, gpus: str, todo: Sequence[Conversation], taken: Any, results: Any
) -> None:
    """Answer dialogues until none is left to do. Runs in a process of its own.

    Args:
        gpus: for CUDA_VISIBLE_DEVICES; "" = as they are.
        taken: how many dialogues were taken, by all.
        results: queue of what is finished.
    """
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus

    def next_ones() -> Iterator[Conversation]:
        parent = parent_process()
        while parent is None or parent.is_alive():
            with taken.get_lock():
                number, taken.value = taken.value, taken.value + 1
            if number >= len(todo):
                return
            yield todo[number]

    try:
        backend = OfflineBackend(settings)
        for result in backend.answer(next_ones()):
            results.put(result)
        backend.close()
    except ViSpecError as error:
        sys.exit(f"vispec: {error}")


def share_gpus(settings: RegenerateSettings) -> list[str]:
    """Return each worker's GPUs, as CUDA_VISIBLE_DEVICES names them; "" on a machine without.

    Raises:
        ViSpecError: there are too few.
    """
    import torch

    workers, count = settings.workers, torch.cuda.device_count()
    if not count:
        return [""] * workers
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = iter(named.split(",") if named else map(str, range(count)))
    kinds = "tensor", "pipeline"
    each = math.prod(int(settings.engine.get(f"{kind}_parallel_size", 1)) for kind in kinds)
    if workers * each > count:
        raise ViSpecError(
            f"--workers {workers} with {each} GPUs each, there are {count}: lower --workers to "
            f"{max(count // each, 1)} or tensor_parallel_size in --engine"
        )
    return [",".join(islice(gpus, each)) for _ in range(workers)]


def drain(
    queue: Any, work: Callable[[], None], seen: set[str], poll_s: float = 1.0
) -> Iterator[Result]:
    """Run `work` in a thread; meanwhile yield what it has put into the queue, each dialogue once.

    Args:
        seen: ids of what came; they are added to it.

    Raises:
        ViSpecError: it failed; everything that had been put into the queue comes first.
    """
    failures: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:  # whatever it is, it belongs to the thread that waits
            failures.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    while True:
        alive = thread.is_alive()
        try:
            result: Result = queue.get(timeout=poll_s)
        except Empty:
            if alive:
                continue
            break
        source = result if isinstance(result, Rejected) else result.conversation
        if source.sample_id not in seen:
            seen.add(source.sample_id)
            yield result
    for error in failures:
        # Ray puts what was raised in an actor at the end of a traceback.
        text = str(error).strip()
        reason = find_cause(text) if text else type(error).__name__
        raise ViSpecError(f"the workers failed: {reason}") from error
