"""A Ray job: engines in actors, fed by Ray Data.

Ray Data hands over a block's results when the block is finished; to lose nothing when a job is
killed, workers also put every finished dialogue into a queue, and the job takes them from there.
A block that Ray runs again after a worker died may come twice: the second time is dropped.

Where Ray Data's own packages (pandas, pyarrow) are missing, a pool of the same actors does the
work of handing out blocks.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty
from threading import Thread
from types import MappingProxyType
from typing import Any

from vllm_vispec.data.regenerate.backends.offline import OfflineBackend
from vllm_vispec.data.regenerate.backends.wire import (
    conversation_from_json,
    conversation_to_json,
    result_from_json,
    result_id,
    result_to_json,
)
from vllm_vispec.data.regenerate.dialogue import Regenerated
from vllm_vispec.data.regenerate.settings import RegenerateSettings
from vllm_vispec.data.types import Conversation, Rejected
from vllm_vispec.utils.engine_start import find_cause
from vllm_vispec.utils.errors import ViSpecError

BLOCK = 64
"""Most dialogues of one block. Small blocks keep the workers equally busy, an engine needs many."""
POLL_S = 1.0
RAY_EXTRA = 'pip install "ray[data]"'

logger = logging.getLogger(__name__)

Item = dict[str, str]
Blocks = list[list[Item]]
HandOut = Callable[["Cluster", Blocks], set[int]]
"""Has all blocks answered; returns the processes that did it."""


@dataclass(frozen=True)
class Cluster:
    """What a way to hand out blocks needs; ``gpus`` are per worker."""

    settings: RegenerateSettings
    queue: Any
    workers: int
    gpus: int


class BlockWorker:
    """Lives in an actor: one engine that answers blocks of dialogues (JSON in, JSON out)."""

    def __init__(self, settings: RegenerateSettings, queue: Any) -> None:
        self.queue = queue
        self.backend = OfflineBackend(settings)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        """Answer a block and return, for each dialogue, this process (Ray Data wants columns)."""
        done = 0
        texts = [str(text) for text in batch["item"]]
        for result in self.backend.answer(conversation_from_json(text) for text in texts):
            self.queue.put(result_to_json(result))
            done += 1
        return {"process": [os.getpid()] * done}


class RayBackend:
    """Hands dialogues to the workers of a Ray cluster (a local one if none is running)."""

    def __init__(self, settings: RegenerateSettings) -> None:
        try:
            import ray
        except ImportError as error:
            raise ViSpecError(f"--ray needs Ray; run: {RAY_EXTRA}") from error
        self.settings = settings.anywhere()
        self.started = not ray.is_initialized()
        if self.started:
            ray.init(log_to_driver=False, include_dashboard=False)
        self.way = choose_way()
        if self.way != "data":
            logger.warning(
                "Ray Data is incomplete here (%s); a pool of Ray actors runs the job instead",
                RAY_EXTRA,
            )
        self.processes: set[int] = set()

    def answer(self, conversations: Iterable[Conversation]) -> Iterator[Regenerated | Rejected]:
        """Yield each conversation's result as soon as it is there.

        Raises:
            ViSpecError: the workers failed.
        """
        import ray
        from ray.util.queue import Queue

        items = [{"item": conversation_to_json(item)} for item in conversations]
        blocks = to_blocks(items, self.settings.workers)
        tensor_parallel = int(self.settings.engine.get("tensor_parallel_size", 1))
        gpus = tensor_parallel if ray.cluster_resources().get("GPU", 0) else 0
        queue = Queue()
        cluster = Cluster(self.settings, queue, min(self.settings.workers, len(blocks)), gpus)
        job = BlockJob(HAND_OUT[self.way], cluster, blocks)
        try:
            yield from drain(queue, job)
        finally:
            self.processes = job.processes
            queue.shutdown()

    def close(self) -> None:
        """Stop the local cluster if this job started it."""
        import ray

        if self.started:
            ray.shutdown()


class BlockJob(Thread):
    """Hands out all blocks in a thread of its own, so that results can be taken meanwhile."""

    def __init__(self, hand_out: HandOut, cluster: Cluster, blocks: Blocks) -> None:
        super().__init__(daemon=True)
        self._hand_out = hand_out
        self._cluster = cluster
        self._blocks = blocks
        self.error: BaseException | None = None
        self.processes: set[int] = set()
        self.start()

    def run(self) -> None:
        """Run until every block is answered or one of them failed for good."""
        try:
            self.processes = self._hand_out(self._cluster, self._blocks)
        except Exception as error:  # whatever it is, it belongs to the thread that waits
            self.error = error


def drain(queue: Any, job: BlockJob, poll: float = POLL_S) -> Iterator[Regenerated | Rejected]:
    """Yield what the workers put into the queue until they are through.

    Raises:
        ViSpecError: they failed; everything they had put into the queue comes first.
    """
    seen: set[str] = set()
    while True:
        alive = job.is_alive()
        try:
            result = result_from_json(queue.get(timeout=poll))
        except Empty:
            if alive:
                continue
            break
        if result_id(result) not in seen:
            seen.add(result_id(result))
            yield result
    if job.error is not None:
        reason = user_reason(job.error)
        raise ViSpecError(f"the Ray job failed: {reason}") from job.error


def user_reason(error: BaseException) -> str:
    """Return what was raised in an actor: Ray puts it at the end of a traceback."""
    return find_cause(str(error)) if str(error).strip() else type(error).__name__


def to_blocks(items: Sequence[Item], workers: int) -> Blocks:
    """Split the dialogues: at least one block per worker, none longer than `BLOCK`."""
    size = max(1, min(BLOCK, -(-len(items) // workers)))
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def choose_way() -> str:
    """Return "data" if Ray Data is complete here, else "actors"."""
    try:
        importlib.import_module("ray.data")
        importlib.import_module("pyarrow")
    except ImportError:
        return "actors"
    return "data"


def _with_ray_data(cluster: Cluster, blocks: Blocks) -> set[int]:
    """Run the blocks as a Ray Data job; Ray starts a worker again that died."""
    import ray

    items = [item for block in blocks for item in block]
    data = ray.data.from_items(items, override_num_blocks=len(blocks))
    answered = data.map_batches(
        BlockWorker,
        fn_constructor_args=(cluster.settings, cluster.queue),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=cluster.workers),
        num_cpus=1,
        num_gpus=cluster.gpus or None,
    )
    return {int(row["process"]) for row in answered.iter_rows()}


def _with_actors(cluster: Cluster, blocks: Blocks) -> set[int]:
    """Run the blocks in a pool of actors; a block whose worker died is given out again once."""
    import ray
    from ray.util.actor_pool import ActorPool

    actor = ray.remote(num_cpus=1, num_gpus=cluster.gpus, max_restarts=1, max_task_retries=1)(
        BlockWorker
    )
    made = [actor.remote(cluster.settings, cluster.queue) for _ in range(cluster.workers)]
    batches = [{"item": [item["item"] for item in block]} for block in blocks]
    pool = ActorPool(made)
    answered = pool.map_unordered(lambda worker, batch: worker.__call__.remote(batch), batches)
    return {process for block in answered for process in block["process"]}


HAND_OUT: Mapping[str, HandOut] = MappingProxyType({"data": _with_ray_data, "actors": _with_actors})
