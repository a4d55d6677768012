"""vLLM engines of the tests: their options, how they run in a child process, and a handle to ask.

:class:`Engine` is what tests use. Its engine lives in a child process with others (a few at a time,
each started when it is first asked), because a process costs ten seconds and an engine one.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from tests.support import gpu_start
from tests.support.child import Child

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

    from tests.support.workloads import Served

IN_PROCESS_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
}
"""Environment of an engine that lives in this process (set before vLLM is imported)."""
MOST_RUNNING = 4
"""Engines that one process keeps; the one asked least recently is stopped for another."""


DEFAULTS: Mapping[str, Any] = {
    "dtype": "float32",
    "seed": 0,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "block_size": 32,
    "enable_prefix_caching": True,
    "async_scheduling": False,
    "disable_log_stats": False,
}
"""What ``vllm.LLM`` is told unless a test says otherwise."""


@dataclass(frozen=True)
class EngineOptions:
    """Settings of one test engine; ``llm`` goes to ``vllm.LLM`` as it is.

    ``name`` tells an engine that a test changes from others with the same settings.

    ``num_blocks`` limits the KV cache to that many blocks of ``block_size`` tokens (small values
    force preemption). ``draft`` switches speculation with ``num_draft_tokens`` tokens on;
    ``tree`` is the setting of that name, ``config`` holds further speculative settings.

    Engines run eagerly and with a KV cache of a given size unless ``compiler`` and
    ``memory_profile`` say otherwise. ``compiler`` says what compiles the models: "inductor" as vLLM
    does on CPU, "piecewise" as it does on GPUs (inductor too, between attention layers), or
    "eager", which runs the graphs as they are and takes a second.
    """

    model: str
    draft: str | None = None
    num_draft_tokens: int = 5
    method: str = "vispec"
    tree: Mapping[str, Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    num_blocks: int = 512
    compiler: Literal["eager", "inductor", "piecewise"] | None = None
    memory_profile: bool = False
    name: str = ""
    llm: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, **options: Any) -> EngineOptions:
        """Return the options; those that are none of ours are vLLM's."""
        names = {one.name for one in fields(cls)} & options.keys()
        own = {name: options.pop(name) for name in names}
        return cls(**own, llm=options)

    def llm_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments for ``vllm.LLM``."""
        kwargs = {"model": self.model, **DEFAULTS, "enforce_eager": self.compiler is None}
        if self.memory_profile:
            kwargs["gpu_memory_utilization"] = gpu_start.memory_fraction()
        else:
            kwargs["num_gpu_blocks_override"] = self.num_blocks
        if self.draft is not None:
            kwargs["per_request_spec_decode_metrics"] = "detailed"
            kwargs["speculative_config"] = {
                "method": self.method,
                "model": self.draft,
                "num_speculative_tokens": self.num_draft_tokens,
                # Most tests follow single drafts.
                **({"adaptive": False} if self.method == "vispec" else {}),
                **({} if self.tree is None else {"tree": dict(self.tree)}),
                **self.config,
            }
        return kwargs | dict(self.llm)

    def key(self) -> str:
        """Return what tells these options from others."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Completion:
    """One finished sequence with what each of its verification steps did."""

    token_ids: list[int]
    text: str
    finish_reason: str | None
    per_step_accepted: list[int]
    drafted: list[int]
    num_cached_tokens: int
    logprobs: list[dict[int, float]]


@dataclass(frozen=True)
class Engine:
    """An engine in a child process.

    Attributes:
        place: What tells the child from others.
        kind: The target's family.
        memo: What :meth:`once` found, of all engines.
        generated: What :meth:`generate` returned.
    """

    child: Child
    place: str
    options: EngineOptions
    kind: str
    memo: dict[str, Any]
    generated: list[Completion] = field(default_factory=list)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return ``function(llm, *args, **kwargs)``, called where the engine is."""
        return self.child.call(_on_engine, self.options, function, *args, **kwargs)

    def once(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return ``run(...)``, called once for all tests of the session that ask."""
        asked = (self.place, self.options.key(), function.__qualname__, args, kwargs)
        key = repr(asked)
        if key not in self.memo:
            self.memo[key] = self.run(function, *args, **kwargs)
        return self.memo[key]

    def generate(self, prompts: Sequence[Any], max_tokens: int = 16, **params: Any) -> list[Any]:
        """Answer ``prompts`` (text, or as vLLM takes them) greedily; the completion of each."""
        found: list[Completion] = self.run(_generate, list(prompts), max_tokens, params)
        self.generated.extend(found)
        return found

    def drafts(self) -> int:
        """Return how many times tokens were drafted for what was generated."""
        return sum(len(one.drafted) for one in self.generated)

    def acceptance(self) -> float:
        """Return the accepted draft tokens per draft."""
        accepted = sum(sum(one.per_step_accepted) for one in self.generated)
        return accepted / max(self.drafts(), 1)

    def serve(self, scenario: str, **kwargs: Any) -> Served:
        """Serve a scenario of :mod:`tests.support.workloads`, once for all tests that ask."""
        from tests.support.workloads import serve

        found: Served = self.once(serve, scenario, self.kind, **kwargs)
        return found


def _place(env: Mapping[str, str], process: str) -> str:
    return json.dumps([process, dict(env)], sort_keys=True)


StartEngine = Callable[..., Engine]
"""The fixture ``engine``: ``engine(runner, **options)``."""
StartProcess = Callable[..., Child]
"""The fixture ``child``: ``child(runner, env, process)``."""


class Engines:
    """Child processes by environment, of which the last few used stay, and engines in them."""

    MOST_PROCESSES = 3

    def __init__(self) -> None:
        self._children: dict[str, Child] = {}
        self._memo: dict[str, Any] = {}

    def child(self, env: Mapping[str, str], process: str = "") -> Child:
        """Return the process with ``env`` added to its environment.

        ``process`` names one apart from the others, for functions that change vLLM itself.
        """
        key = _place(env, process)
        child = self._children.pop(key, None)
        if child is None or not child.is_open:
            while len(self._children) >= self.MOST_PROCESSES:
                self._children.pop(next(iter(self._children))).close()
            child = Child(env)
        self._children[key] = child
        return child

    def engine(
        self, env: Mapping[str, str], process: str, options: EngineOptions, kind: str
    ) -> Engine:
        """Return a handle to an engine in that process."""
        return Engine(self.child(env, process), _place(env, process), options, kind, self._memo)

    def close(self) -> None:
        """End all processes."""
        for child in self._children.values():
            child.close()


# What follows runs in the child.

_running: dict[str, LLM] = {}


def _on_engine(
    options: EngineOptions, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    key = options.key()
    llm = _running.pop(key, None)
    if llm is None:
        while len(_running) >= MOST_RUNNING:
            stop(_running.pop(next(iter(_running))))
        llm = start(options)
    _running[key] = llm
    return function(llm, *args, **kwargs)


def end_process() -> None:
    """Let the engines' own processes end, then this one at once."""
    for llm in _running.values():
        llm.llm_engine.engine_core.shutdown()
    os._exit(0)


def prepare_process() -> None:
    """Set the in-process environment (call before importing vLLM)."""
    for name, value in IN_PROCESS_ENV.items():
        os.environ.setdefault(name, value)


def register_plugin() -> None:
    """Load the ViSpec plugin even where its entry point is not installed (idempotent)."""
    from vllm_vispec.plugin import register

    register()


def start(options: EngineOptions) -> LLM:
    """Return a running engine; :func:`stop` ends it."""
    prepare_process()
    if options.draft is not None:
        register_plugin()
    from vllm import LLM
    from vllm.model_executor.layers import rotary_embedding

    # vLLM keeps rotary tables for all engines of a process. Those of a tower that a text-only
    # engine leaves out lie on the meta device.
    rotary_embedding._ROPE_DICT.clear()
    _take_over_freezing()
    with (
        gpu_start.platform(options.llm.get("async_scheduling", False), options.compiler),
        gpu_start.memory_profile(options.memory_profile),
    ):
        try:
            return LLM(**options.llm_kwargs())
        except BaseException:
            if not _running:
                shut_down_distributed()
            raise


def stop(llm: LLM) -> None:
    """Stop an engine, and with the last one vLLM's process-wide state."""
    llm.llm_engine.engine_core.shutdown()
    if not _running:
        shut_down_distributed()


def shut_down_distributed() -> None:
    """Destroy vLLM's process-wide state, so that the next engine starts like in a new process."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    gc.collect()
    _freeze()


_freeze = gc.freeze


def _take_over_freezing() -> None:
    """Keep what was imported out of the collections of garbage, eleven per engine, 0.5 s each.

    vLLM freezes an engine's objects and thaws everything when the engine ends; here what outlives
    an engine is frozen and stays so, and engines are collected.
    """
    if gc.freeze is not _nothing:
        atexit.register(gc.unfreeze)
        gc.freeze = gc.unfreeze = _nothing
        _freeze()


def _nothing() -> None:
    pass


def greedy(max_tokens: int, **kwargs: Any) -> SamplingParams:
    """Return greedy sampling parameters that run to exactly ``max_tokens`` by default."""
    from vllm import SamplingParams

    settings: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens}
    return SamplingParams(**(settings | kwargs))


def _generate(
    llm: LLM, prompts: list[Any], max_tokens: int, params: dict[str, Any]
) -> list[Completion]:
    outputs = llm.generate(prompts, greedy(max_tokens, **params), use_tqdm=False)
    return [completions(output)[0] for output in outputs]


def completions(output: RequestOutput) -> list[Completion]:
    """Convert all sequences of a finished request (``n`` of them)."""
    return [
        Completion(
            list(item.token_ids),
            item.text,
            item.finish_reason,
            list(getattr(item.spec_decode_metrics, "per_step_accepted", ())),
            list(getattr(item.spec_decode_metrics, "per_step_drafted", ())),
            output.num_cached_tokens or 0,
            [{k: v.logprob for k, v in row.items()} for row in item.logprobs or ()],
        )
        for item in output.outputs
    ]
