"""A Ray Data job: engines in actors that answer blocks of dialogues.

Ray Data hands over a block's results when the block is finished. To lose nothing when a job is
killed, workers also put every finished dialogue into a queue, and the job takes them from there.
A block that Ray runs again after a worker died may come twice: the second time is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from queue import Empty
from threading import Thread
from typing import Any

from vllm_vispec.data.regenerate.dialogue import Result
from vllm_vispec.data.regenerate.offline import OfflineBackend
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.types import Conversation, Rejected
from vllm_vispec.utils.engine_start import find_cause
from vllm_vispec.utils.errors import ViSpecError

BLOCK = 64
"""Most dialogues of one block. Small blocks keep the workers equally busy, an engine needs many."""


class BlockWorker:
    """Lives in an actor: one engine that answers blocks of dialogues, given by their numbers."""

    def __init__(self, settings: RegenerateSettings, conversations: Any, queue: Any) -> None:
        import ray

        self.conversations: Sequence[Conversation] = ray.get(conversations)
        self.queue, self.backend = queue, OfflineBackend(settings)

    def __call__(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Answer a block; what is returned only says that it is done."""
        for result in self.backend.answer([self.conversations[number] for number in batch["id"]]):
            self.queue.put(result)
        return batch


class RayBackend:
    """Hands dialogues to the workers of a Ray cluster (a local one if none is running)."""

    def __init__(self, settings: RegenerateSettings) -> None:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise ViSpecError(
                f"--ray needs Ray Data ({error}); run: pip install 'vllm-vispec[ray]'"
            ) from error
        self.settings = settings.with_absolute_paths()
        self.started = not ray.is_initialized()
        if self.started:
            ray.init(log_to_driver=False, include_dashboard=False)

    def answer(self, conversations: Iterable[Conversation]) -> Iterator[Result]:
        """See `Backend.answer`."""
        from ray.util.queue import Queue

        queue, todo = Queue(), list(conversations)
        try:
            yield from drain(queue, lambda: self._run(todo, queue))
        finally:
            queue.shutdown()

    def close(self) -> None:
        """Stop the local cluster if this job started it."""
        import ray

        if self.started:
            ray.shutdown()

    def _run(self, todo: list[Conversation], queue: Any) -> None:
        """Have all blocks answered; Ray starts a worker again that died."""
        import ray

        blocks = num_blocks(len(todo), self.settings.workers)
        has_gpu = ray.cluster_resources().get("GPU", 0)
        gpus = int(self.settings.engine.get("tensor_parallel_size", 1)) if has_gpu else None
        answered = ray.data.range(len(todo), override_num_blocks=blocks).map_batches(
            BlockWorker,
            fn_constructor_args=(self.settings, ray.put(todo), queue),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=min(self.settings.workers, blocks)),
            num_cpus=1,
            num_gpus=gpus,
        )
        for _ in answered.iter_batches(batch_size=None):
            pass


def drain(queue: Any, work: Callable[[], None], poll_s: float = 1.0) -> Iterator[Result]:
    """Run `work` in a thread; meanwhile yield what it has put into the queue, each dialogue once.

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
    seen: set[str] = set()
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
        raise ViSpecError(f"the Ray job failed: {reason}") from error


def num_blocks(count: int, workers: int) -> int:
    """Return a number of blocks: one per worker if there is enough, none longer than `BLOCK`."""
    return max(min(count, workers), -(-count // BLOCK))
