"""Start, drive and completely stop in-process vLLM engines, one after another."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tests.support import gpu_start

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

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


@dataclass(frozen=True)
class EngineOptions:
    """Settings of one test engine; ``extra`` goes to ``vllm.LLM`` unchanged.

    ``num_blocks`` limits the KV cache to that many blocks of ``block_size`` tokens (small values
    force preemption). ``draft`` switches speculation with ``num_draft_tokens`` tokens on;
    ``tree`` is the setting of that name.

    Engines run eagerly, in fp32 and with a KV cache of a given size unless ``compiler``, ``dtype``
    and ``memory_profile`` say otherwise. ``compiler`` says what compiles the models: "inductor" as
    vLLM does on CPU, "piecewise" as it does on GPUs (inductor too, between attention layers), or
    "eager", which runs the graphs as they are and takes a second.
    """

    model: str
    draft: str | None = None
    num_draft_tokens: int = 5
    method: str = "vispec"
    tree: Mapping[str, Any] | None = None
    max_model_len: int = 512
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    num_blocks: int | None = None
    block_size: int = 32
    prefix_caching: bool = True
    async_scheduling: bool = False
    compiler: Literal["eager", "inductor", "piecewise"] | None = None
    dtype: str = "float32"
    memory_profile: bool = False
    enable_mm_embeds: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def llm_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments for ``vllm.LLM``."""
        kwargs: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "seed": 0,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "block_size": self.block_size,
            "enable_prefix_caching": self.prefix_caching,
            "async_scheduling": self.async_scheduling,
            "enforce_eager": self.compiler is None,
            "disable_log_stats": False,
        }
        if self.num_blocks is not None:
            kwargs["num_gpu_blocks_override"] = self.num_blocks
        if self.memory_profile:
            kwargs["gpu_memory_utilization"] = gpu_start.memory_fraction()
        if self.enable_mm_embeds:
            kwargs["enable_mm_embeds"] = True
        if self.draft is not None:
            kwargs["per_request_spec_decode_metrics"] = "detailed"
            kwargs["speculative_config"] = {
                "method": self.method,
                "model": self.draft,
                "num_speculative_tokens": self.num_draft_tokens,
            }
            if self.tree is not None:
                kwargs["speculative_config"]["tree"] = dict(self.tree)
        return kwargs | dict(self.extra)


@dataclass(frozen=True)
class Completion:
    """One finished sequence with what each of its verification rounds did."""

    token_ids: list[int]
    text: str
    finish_reason: str | None
    accepted_draft: list[int]
    drafted: list[int]
    num_cached_tokens: int
    request_id: str
    logprobs: list[dict[int, float]] | None = None

    @property
    def mean_accepted(self) -> float:
        """Mean ``accepted_draft`` per round, 0 without rounds."""
        rounds = self.accepted_draft
        return sum(rounds) / len(rounds) if rounds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)


def prepare_process() -> None:
    """Set the in-process environment and load the plugin (call before importing vLLM)."""
    for name, value in IN_PROCESS_ENV.items():
        os.environ.setdefault(name, value)


def register_plugin() -> None:
    """Load the ViSpec plugin even where its entry point is not installed (idempotent)."""
    from vllm_vispec.plugin import register

    register()


@contextmanager
def engine(options: EngineOptions) -> Iterator[LLM]:
    """Yield a running ``vllm.LLM`` and take everything down afterwards."""
    prepare_process()
    if options.draft is not None:
        register_plugin()
    from vllm import LLM

    _take_over_freezing()
    llm: LLM | None = None
    try:
        with (
            _cpu_keeps_async_scheduling(options.async_scheduling),
            gpu_start.compiler(options.compiler),
            gpu_start.memory_profile(options.memory_profile),
        ):
            llm = LLM(**options.llm_kwargs())
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        shut_down_distributed()


@contextmanager
def _cpu_keeps_async_scheduling(wanted: bool) -> Iterator[None]:
    """Undo that vLLM's CPU platform switches async scheduling off without a word."""
    if not wanted:
        yield
        return
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = original


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


def generate(
    llm: LLM, prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams]
) -> list[Completion]:
    """Run ``prompts`` as one batch and return the first sequence of each, in order."""
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    return [completions(output)[0] for output in outputs]


def completions(output: RequestOutput) -> list[Completion]:
    """Convert all sequences of a finished request (``n`` of them)."""
    return [_completion(item, output) for item in output.outputs]


def _completion(item: Any, output: RequestOutput) -> Completion:
    metrics = item.spec_decode_metrics
    rows = item.logprobs
    return Completion(
        token_ids=list(item.token_ids),
        text=item.text,
        finish_reason=item.finish_reason,
        accepted_draft=list(metrics.per_step_accepted) if metrics else [],
        drafted=list(metrics.per_step_drafted) if metrics else [],
        num_cached_tokens=output.num_cached_tokens or 0,
        request_id=output.request_id,
        logprobs=[{k: v.logprob for k, v in row.items()} for row in rows] if rows else None,
    )


def metric_value(llm: LLM, name: str) -> float:
    """Return the sum over all series of the counter or gauge ``name`` (0 if it is absent)."""
    found = [metric for metric in llm.get_metrics() if metric.name == name]
    return float(sum(getattr(metric, "value", 0) for metric in found))
