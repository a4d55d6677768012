"""A child-process job: engines that find out themselves how large their KV cache may be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from tests.engine import lossless_jobs
from tests.support import engine

_CACHE_SIZE = "VLLM_CPU_KVCACHE_SPACE"


def serve(setups: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Serve as :func:`lossless_jobs.serve` does; vLLM runs what it runs at start on GPUs."""
    engine.IN_PROCESS_ENV.pop(_CACHE_SIZE, None)
    os.environ.pop(_CACHE_SIZE, None)
    engine.prepare_process()
    _profile_on_zeros()
    parts = _watch_parts()
    for item in lossless_jobs.serve(setups):
        yield item | {"most_parts": max(parts, default=0)}
        parts.clear()


def _watch_parts() -> list[int]:
    """Return a list that takes the parts of every batch whose trees are grown."""
    from vllm_vispec.trees import parts
    from vllm_vispec.trees import speculator as v2
    from vllm_vispec.v1 import tree_proposer as v1

    counts: list[int] = []
    original = parts.parts_of

    def parts_of(*args: Any) -> list[slice]:
        found = list(original(*args))
        counts.append(len(found))
        return found

    for module in (v1, v2):
        setattr(module, "parts_of", parts_of)  # noqa: B010
    return counts


def _profile_on_zeros() -> None:
    """Let attention without metadata return zeros, as it does on GPUs.

    On CPUs vLLM returns memory as it finds it; Triton's interpreter ends at NaN in it.
    """
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    original = CPUAttentionBackendImpl.forward

    def forward(
        self: Any,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        output: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if attn_metadata is None and output is not None:
            return output.zero_()
        return original(
            self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )

    CPUAttentionBackendImpl.forward = forward
