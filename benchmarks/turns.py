"""Engines that stay up beside each other and answer the same held-out samples in turns.

Several drafts take turns with one engine of plain vLLM, call by call, so that all of them meet the
same state of the machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.calls import Call, Measured, Memory
from examples.tiny_vlm.samples import demo_samples
from examples.tiny_vlm.shipped import MAX_MODEL_LEN
from vllm_vispec.bench.machine import has_gpu, server_environment
from vllm_vispec.bench.schema import Record
from vllm_vispec.evaluate.engine import inside_answer
from vllm_vispec.trees.attention import tree_memory
from vllm_vispec.utils.files import read_json, write_json
from vllm_vispec.utils.process import WorkerProcess, serve_requests

BESIDE = 5
"""Drafts that take turns with one plain engine, so that it is paid for once."""

Plan = Sequence[tuple[tuple[int, ...], tuple[str, ...]]]
"""The samples of each call, and the families of these."""


@dataclass(frozen=True)
class Job:
    """One engine and the held-out samples that it is asked about.

    Attributes:
        speculative: vLLM's ``speculative_config``; None for plain vLLM.
        per_family: Samples of every task family.
        engine: More arguments of ``vllm.LLM``, which win over those made here.
    """

    model: str
    speculative: Mapping[str, Any] | None = None
    dtype: str = "float32"
    max_tokens: int = 256
    per_family: int = 2
    families: tuple[str, ...] = ()
    engine: Mapping[str, Any] = field(default_factory=dict)

    def llm_kwargs(self) -> dict[str, Any]:
        """Return arguments of ``vllm.LLM``; nothing is cached between requests."""
        kwargs: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "seed": 0,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_batched_tokens": MAX_MODEL_LEN,
            "max_num_seqs": 4,
            "gpu_memory_utilization": 0.4,
            "enable_prefix_caching": False,
            "mm_processor_cache_gb": 0,
            "disable_log_stats": False,
        }
        if self.speculative is not None:
            kwargs["per_request_spec_decode_metrics"] = "detailed"
            kwargs["speculative_config"] = {"adaptive": False, **self.speculative}
        return kwargs | dict(self.engine)


@dataclass(frozen=True)
class Reply(Record):
    """What an engine did with samples that arrived together.

    Attributes:
        token_ids: Of each answer.
        accepted: Accepted draft tokens of every step, for each answer.
        decode_seconds: From the first token of the first answer to the last token of the last one.
        wall_seconds: Of the whole call, image preprocessing included.
    """

    token_ids: tuple[tuple[int, ...], ...]
    accepted: tuple[tuple[int, ...], ...]
    decode_seconds: float
    wall_seconds: float


class Engine(WorkerProcess):
    """An engine in a process of its own; a context manager.

    Raises:
        ViSpecError: It does not start, or ends.
    """

    def __init__(self, name: str, job: Job, log_file: Path, threads: int = 1) -> None:
        environment = {"VLLM_LOGGING_LEVEL": "WARNING"} | server_environment()
        # The engine works only while it is asked, in the very process that is asked.
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(threads)}
        super().__init__(name, "benchmarks.turns", environment, log_file)
        self.job = job

    def begin(self) -> None:
        """Start the engine."""
        job = self.job
        samples = {"per_family": job.per_family, "families": list(job.families)}
        self.request({"llm": job.llm_kwargs(), "max_tokens": job.max_tokens, **samples})

    def ask(self, samples: Sequence[int], temperature: float = 0.0) -> Reply:
        """Have samples answered together."""
        return Reply.from_json(self.request({"samples": [*samples], "temperature": temperature}))

    def memory(self) -> Memory | None:
        """What the engine's tree takes; None without a tree."""
        found = self.request({"memory": True})["memory"]
        return None if found is None else Memory(**found)


def compare(families: tuple[str, ...], plain: Reply, mine: Reply, is_greedy: bool = True) -> Call:
    """Put both answers to a call side by side."""
    same = tuple(a == b for a, b in zip(plain.token_ids, mine.token_ids, strict=True))
    return Call(
        families,
        mine.accepted,
        tuple(len(ids) - 1 for ids in mine.token_ids),
        tuple(len(ids) - 1 for ids in plain.token_ids),
        same if is_greedy else None,
        mine.decode_seconds,
        plain.decode_seconds,
        mine.wall_seconds,
        plain.wall_seconds,
    )


def take_turns(
    plain: Engine, drafts: Sequence[Engine], plan: Plan, temperature: float = 0.0
) -> Iterator[list[Call]]:
    """Yield, for every call, what each engine with a draft did beside plain vLLM."""
    everyone = [plain, *drafts]
    for engine in everyone:
        # Whatever happens once happens here, for the first and for the last, largest batch.
        for samples in {plan[0][0], plan[-1][0]}:
            engine.ask(samples, temperature)
    for number, (samples, families) in enumerate(plan):
        # Whoever comes later may find warmer caches.
        start = number % len(everyone)
        replies = {
            engine.name: engine.ask(samples, temperature)
            for engine in everyone[start:] + everyone[:start]
        }
        yield [
            compare(families, replies[plain.name], replies[engine.name], temperature == 0)
            for engine in drafts
        ]


def side_by_side(
    plain: Job,
    drafts: Mapping[str, Job],
    plan: Plan,
    logs: Path,
    *,
    threads: int = 1,
    temperature: float = 0.0,
    beside: int = BESIDE,
) -> Iterator[tuple[str, Measured]]:
    """Let drafts take turns with plain vLLM, some at a time, and yield what each did.

    Args:
        drafts: By name.
        threads: Of every engine.
        beside: Drafts that are up beside one plain engine; on a GPU it is one.

    Raises:
        ViSpecError: An engine failed.
    """
    if has_gpu():
        # Every engine takes two fifths of its memory.
        beside = 1
    waiting = iter(drafts.items())
    while group := dict(islice(waiting, beside)):
        with ExitStack() as stack:
            first, *others = [
                stack.enter_context(Engine(name, job, logs / f"{name}.log", threads))
                for name, job in {"plain": plain, **group}.items()
            ]
            rows = list(take_turns(first, others, plan, temperature))
            memories = [engine.memory() for engine in others]
        columns = zip(*rows, strict=True)
        yield from zip(group, map(Measured, columns, memories), strict=True)


def measure(files: Mapping[Path, Job], plain: Job, plan: Plan, logs: Path, **more: Any) -> None:
    """Measure every draft that has no result yet, and write it down.

    Args:
        files: Jobs of the drafts by the file that gets the result; its stem is the draft's name.
        more: See `side_by_side`.
    """
    missing = {file.stem: file for file in files if not file.is_file()}
    drafts = {name: files[file] for name, file in missing.items()}
    for name, measured in side_by_side(plain, drafts, plan, logs, **more):
        write_json(missing[name], measured.to_json())
        print(f"measured: {name}", flush=True)


def read_measured(file: Path) -> Measured:
    """Read what `measure` wrote."""
    return Measured.from_json(read_json(file))


class Worker:
    """In the engine's process: a ``vllm.LLM`` and its samples; the first request says which."""

    llm: Any

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Start, say what the engine's tree takes, or answer samples that arrive together."""
        if "llm" in request:
            return self._start(request)
        if "memory" in request:
            return {"memory": self.llm.collective_rpc(memory_of)[0]}
        from vllm import SamplingParams

        samples, temperature = request["samples"], request["temperature"]
        params = [
            SamplingParams(temperature=temperature, seed=sample, max_tokens=self.max_tokens)
            for sample in samples
        ]
        messages = [self.samples[sample].chat_messages() for sample in samples]
        begin = time.perf_counter()
        outputs = self.llm.chat(messages, params, use_tqdm=False)
        wall_seconds = time.perf_counter() - begin
        stats = [output.metrics for output in outputs]
        answers = [output.outputs[0] for output in outputs]
        return {
            "token_ids": [list(answer.token_ids) for answer in answers],
            "accepted": [_accepted(answer) for answer in answers],
            "decode_seconds": max(one.last_token_ts for one in stats)
            - min(one.first_token_ts for one in stats),
            "wall_seconds": wall_seconds,
        }

    def _start(self, request: dict[str, Any]) -> dict[str, Any]:
        import torch
        from vllm import LLM

        self.max_tokens = request["max_tokens"]
        families = tuple(request["families"]) or None
        self.samples = list(demo_samples(request["per_family"], families))
        self.llm = LLM(**request["llm"], enforce_eager=not torch.cuda.is_available())
        return {}


def memory_of(worker: Any) -> dict[str, float] | None:
    """Return the fields of `calls.Memory` for vLLM's worker; None without a tree."""
    found = tree_memory(worker.vllm_config)
    if found is None:
        return None
    return {"kv_percent": found.kv_percent, "buffers_mib": found.num_bytes / 2**20}


def _accepted(answer: Any) -> list[int]:
    """Return the accepted draft tokens of every step, 0 for one without drafts.

    vLLM does not list these, and each of them brought a token; they stand at the end.
    """
    steps, num_tokens = answer.spec_decode_metrics, len(answer.token_ids)
    if steps is None:
        return []
    inside = inside_answer(steps.per_step_accepted, num_tokens)
    return inside + [0] * (num_tokens - 1 - sum(inside) - len(inside))


if __name__ == "__main__":
    worker = Worker()
    serve_requests(worker.answer)
    worker.llm.llm_engine.engine_core.shutdown()
