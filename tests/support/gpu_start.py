"""What a start on a GPU does and vLLM's CPU backend leaves out: compiling, and a memory profile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any
from unittest.mock import patch

_KV_CACHE_BYTES = 2**30


def memory_fraction() -> float:
    """Return the ``gpu_memory_utilization`` that leaves about 1 GiB to the KV cache.

    On CPU it is a fraction of the machine's memory, and the process counts as what it holds.
    """
    import psutil
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

    total = get_memory_node_info(get_allowed_cpu_list()[0].numa_node).total_memory
    held: int = psutil.Process().memory_info().rss
    return (held + _KV_CACHE_BYTES) / total


@contextmanager
def platform(async_scheduling: bool, compiler: str | None) -> Iterator[None]:
    """Keep what vLLM's CPU platform changes without a word in engines that start in here.

    That is asynchronous scheduling, and a GPU's default compile mode for "piecewise".
    """
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        compilation = vllm_config.compilation_config
        mode = compilation.mode
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling |= async_scheduling
        if compiler == "piecewise" and mode == CompilationMode.VLLM_COMPILE:
            compilation.mode = mode
            # Read with the sizes of recorded graphs elsewhere.
            compilation.compile_sizes = []

    with ExitStack() as changed:
        checked = staticmethod(check_and_update_config)
        changed.enter_context(patch.object(CpuPlatform, "check_and_update_config", checked))
        if compiler is not None:
            # The CPU platform takes its backend from this variable alone.
            eager = "1" if compiler == "eager" else "0"
            changed.enter_context(_environment("VLLM_CPU_CI_ENV", eager))
        if compiler == "piecewise":
            from vllm.compilation.passes.utility import fix_functionalization as module

            # It names operators that CUDA builds have; inductor has a pass of its own for ours.
            one = patch.object(module.FixFunctionalizationPass, "__call__", lambda *args: None)
            changed.enter_context(one)
        yield


@contextmanager
def memory_profile(wanted: bool) -> Iterator[None]:
    """Let engines that start in here find out by themselves how large their KV cache can be.

    vLLM's CPU worker does without the profile run in several cases; a GPU's never does. And where a
    profile run skips attention, GPU backends fill its output with zeros, while the CPU's leaves
    what the memory held: Triton's interpreter finds no largest logit if that is NaN. vLLM 0.33 then
    warms up the V2 runner with requests of every kind; here with greedy ones and without grammars,
    since the interpreter refuses the kernels of the others.
    """
    if not wanted:
        yield
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu import warmup
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

    attend = CPUAttentionBackendImpl.forward
    warm_up: Any = getattr(warmup, "_warmup_kernels", None)

    def greedily(*args: Any, greedy: bool = False) -> None:
        if greedy:
            warm_up(*args, greedy=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature(attend).bind(*args, **kwargs).arguments
        if given["attn_metadata"] is None:
            return given["output"].zero_()
        return attend(*args, **kwargs)

    with (
        _environment("VLLM_CPU_KVCACHE_SPACE", None),
        patch.object(CPUWorker, "_should_warm_up_model", lambda worker: True),
        patch.object(CPUAttentionBackendImpl, "forward", forward),
        patch.object(warmup, "_warmup_kernels", greedily, create=True),
        patch.object(StructuredOutputsWorker, "apply_grammar_bitmask", lambda *args: None),
    ):
        yield


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Set or remove a variable; vLLM reads it again although an engine has run before."""
    from vllm import envs

    envs.disable_envs_cache()
    given = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if given is not None:
            os.environ[name] = given
