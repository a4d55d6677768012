"""A Ray Data job: engines in actors, each kept full with dialogues that it takes one by one.

Finished dialogues come back through a queue, so nothing is lost when the job is killed. What a
worker had taken that died is done again; a dialogue that came twice counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from queue import Empty
from time import sleep
from typing import Any

from vllm_vispec.data.regenerate.dialogue import Result
from vllm_vispec.data.regenerate.offline import OfflineBackend
from vllm_vispec.data.regenerate.processes import drain
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.types import Conversation
from vllm_vispec.utils.errors import ViSpecError


class PullingWorker:
    """Lives in an actor: one engine, kept full with dialogues that are still to do."""

    def __init__(
        self, settings: RegenerateSettings, conversations: Any, todo: Any, results: Any
    ) -> None:
        import ray

        self.conversations: Sequence[Conversation] = ray.get(conversations)
        self.todo, self.results, self.backend = todo, results, OfflineBackend(settings)

    def __call__(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Answer dialogues until none is left to do; what is returned means nothing."""
        for result in self.backend.answer(map(self.conversations.__getitem__, taken(self.todo))):
            self.results.put(result)
        return batch


def taken(todo: Any) -> Iterator[int]:
    """Take numbers out of a queue until it is empty."""
    while True:
        try:
            yield todo.get_nowait()
        except Empty:  # Ray's is a subclass
            return


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

        numbers, results, todo = Queue(), Queue(), list(conversations)
        seen: set[str] = set()
        try:
            yield from drain(results, lambda: self._run(todo, numbers, results, seen), seen)
        finally:
            for queue in (numbers, results):
                queue.shutdown()

    def close(self) -> None:
        """Stop the local cluster if this job started it."""
        import ray

        if self.started:
            ray.shutdown()

    def _run(self, todo: list[Conversation], numbers: Any, results: Any, seen: set[str]) -> None:
        """Have everything answered; what a worker that died had taken is done again."""
        left = list(range(len(todo)))
        while left:
            numbers.put_nowait_batch(left)
            self._answer(todo, numbers, results)
            while not results.empty():
                sleep(0.1)
            before, left = left, [n for n in left if todo[n].sample_id not in seen]
            if len(left) == len(before):
                return  # the job says what is missing

    def _answer(self, todo: list[Conversation], numbers: Any, results: Any) -> None:
        import ray

        workers = min(self.settings.workers, len(todo))
        has_gpu = ray.cluster_resources().get("GPU", 0)
        gpus = int(self.settings.engine.get("tensor_parallel_size", 1)) if has_gpu else None
        # One block a worker, and none waits at a worker that is busy.
        answered = ray.data.range(workers, override_num_blocks=workers).map_batches(
            PullingWorker,
            fn_constructor_args=(self.settings, ray.put(todo), numbers, results),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            num_gpus=gpus,
        )
        for _ in answered.iter_batches(batch_size=None):
            pass
