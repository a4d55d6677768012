"""Engines that stay up beside each other and answer the same held-out samples in turns.

Several drafts take turns with one engine of plain vLLM, call by call, so that all of them meet the
same state of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from examples.tiny_vlm.shipped import MAX_MODEL_LEN
from vllm_vispec.bench.bootstrap import bootstrap
from vllm_vispec.bench.machine import server_environment
from vllm_vispec.utils.process import WorkerProcess

WORKER = "benchmarks.turns_worker"


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
            kwargs["speculative_config"] = dict(self.speculative)
        return kwargs | dict(self.engine)


@dataclass(frozen=True)
class Reply:
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


@dataclass(frozen=True)
class Memory:
    """What a tree takes: percent of the KV cache on top, and buffers in MiB."""

    kv_percent: float
    buffers_mib: float


class Engine(WorkerProcess):
    """An engine in a process of its own; a context manager.

    Raises:
        ViSpecError: It does not start, or ends.
    """

    def __init__(self, name: str, job: Job, log_file: Path, threads: int = 1) -> None:
        environment = {"VLLM_LOGGING_LEVEL": "WARNING"} | server_environment()
        # The engine works only while it is asked, in the very process that is asked.
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(threads)}
        super().__init__(name, WORKER, environment, log_file)
        self.job = job

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            job = self.job
            samples = {"per_family": job.per_family, "families": list(job.families)}
            self.request({"llm": job.llm_kwargs(), "max_tokens": job.max_tokens, **samples})
        except BaseException:
            self.stop()
            raise
        return self

    def ask(self, samples: Sequence[int], temperature: float = 0.0) -> Reply:
        """Have samples answered together."""
        found = self.request({"samples": list(samples), "temperature": temperature})
        return Reply(**{name: as_tuples(value) for name, value in found.items()})

    def memory(self) -> Memory | None:
        """What the engine's tree takes; None without a tree."""
        found = self.request({"memory": True})["memory"]
        return None if found is None else Memory(**found)


@dataclass(frozen=True)
class Call:
    """Samples answered together by an engine with a draft, beside plain vLLM.

    Attributes:
        families: Of the samples.
        accepted: Accepted draft tokens of every step, for each sample.
        decoded, plain_decoded: Tokens after the first, for each sample.
        identical: Whether the tokens are those of plain decoding; None where they need not be.
        seconds, plain_seconds: From the first token of the call to its last.
        wall_seconds, plain_wall_seconds: Of the whole call.
    """

    families: tuple[str, ...]
    accepted: tuple[tuple[int, ...], ...]
    decoded: tuple[int, ...]
    plain_decoded: tuple[int, ...]
    identical: tuple[bool, ...] | None
    seconds: float
    plain_seconds: float
    wall_seconds: float = 0.0
    plain_wall_seconds: float = 0.0

    @property
    def batch(self) -> int:
        """Requests at a time."""
        return len(self.families)


def as_tuples(value: Any) -> Any:
    """Return JSON's lists as tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


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
    plain: Engine,
    drafts: Sequence[Engine],
    plan: Sequence[tuple[tuple[int, ...], tuple[str, ...]]],
    temperature: float = 0.0,
) -> Iterator[list[Call]]:
    """Yield, for every call, what each engine with a draft did beside plain vLLM.

    Args:
        plan: The samples of each call, and the families of these.
    """
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


Statistic = Callable[[Sequence[Call]], float]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % bootstrap interval over calls."""

    value: float
    low: float
    high: float


def estimate(calls: Sequence[Call], statistic: Statistic) -> Estimate:
    """A statistic with its interval."""
    low, high = bootstrap(calls, (0,), lambda drawn: statistic(list(drawn))).tolist()
    return Estimate(statistic(calls), low, high)


def acceptance_length(calls: Sequence[Call]) -> float:
    """Accepted draft tokens of a step, plus the bonus token."""
    steps = [count for call in calls for accepted in call.accepted for count in accepted]
    return 1 + sum(steps) / max(len(steps), 1)


def acceptance_rate_per_position(calls: Sequence[Call], num_draft_tokens: int) -> list[float]:
    """Share of steps that accepted the draft token at each position."""
    steps = [count for call in calls for accepted in call.accepted for count in accepted]
    total = max(len(steps), 1)
    return [sum(count > place for count in steps) / total for place in range(num_draft_tokens)]


def decode_speedup(calls: Sequence[Call]) -> float:
    """Tokens per second over those of plain vLLM in the same calls, prefill excluded."""
    mine = sum(sum(call.decoded) for call in calls), sum(call.seconds for call in calls)
    plain = sum(sum(call.plain_decoded) for call in calls), sum(c.plain_seconds for c in calls)
    return _quotient(mine) / (_quotient(plain) or float("nan"))


def e2e_speedup(calls: Sequence[Call]) -> float:
    """The same of whole calls, prefill and image preprocessing included."""
    mine = sum(sum(c.decoded) + c.batch for c in calls), sum(c.wall_seconds for c in calls)
    plain = (
        sum(sum(c.plain_decoded) + c.batch for c in calls),
        sum(c.plain_wall_seconds for c in calls),
    )
    return _quotient(mine) / (_quotient(plain) or float("nan"))


def step_cost(calls: Sequence[Call]) -> float:
    """Seconds of a step, drafting included, over those of a pass of plain vLLM.

    A batch takes as many passes as its longest answer.
    """
    steps = sum(max(len(accepted) for accepted in call.accepted) for call in calls)
    passes = sum(max(call.plain_decoded) for call in calls)
    mine, plain = (sum(call.seconds for call in calls), sum(c.plain_seconds for c in calls))
    if not steps or not passes or not plain:
        return float("nan")
    return (mine / steps) / (plain / passes)


def identical(calls: Sequence[Call]) -> tuple[int, int] | None:
    """Answers equal to plain vLLM's, and all answers; None where they need not be equal."""
    found = [same for call in calls for same in call.identical or ()]
    return (sum(found), len(found)) if found else None


def _quotient(pair: tuple[float, float]) -> float:
    return pair[0] / pair[1] if pair[1] else float("nan")
