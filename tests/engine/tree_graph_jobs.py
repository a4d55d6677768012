"""A child-process job: a V2 engine whose trees grow, and are walked, in what vLLM records.

On a CPU a recording is the function itself, called again with what it was recorded with: static
buffers, metadata and the padded number of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from tests.engine.lossless_jobs import mixed
from tests.engine.workloads import as_json, forget
from tests.support import draft_logits, engine


def serve(kind: str, options: dict[str, Any], sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Serve the same requests with trees grown eagerly, then by recordings of ``sizes`` tokens."""
    with engine.engine(engine.EngineOptions(**options)) as llm:
        yield {"name": "eager", "results": as_json(mixed(llm, kind, 12, 6))}
        speculator = draft_logits.drafter(llm)
        replayed = _record(speculator, sizes)
        forget(llm)
        results = as_json(mixed(llm, kind, 12, 6))
        yield {"name": "recorded", "results": results, "replayed": replayed}


def _record(speculator: Any, sizes: list[int]) -> list[tuple[int, int]]:
    """Record walks and growth; return a list of (rows a request, requests) of all replays."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
    from vllm.v1.worker.gpu import cudagraph_utils
    from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
        SpeculatorCudaGraphManager,
    )

    replayed: list[tuple[int, int]] = []

    def capture(manager: Any, create_forward_fn: Any, progress_bar_desc: str = "") -> None:
        for desc in manager._capture_descs.get(CUDAGraphMode.FULL, []):
            create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
            forward = create_forward_fn(desc, warmup=False)
            forward(CUDAGraphMode.NONE)
            manager.graphs[desc] = SimpleNamespace(replay=_replay(forward, desc, replayed))
        manager._graphs_captured = True

    cudagraph_utils.CudaGraphManager.capture = capture
    CpuPlatform.get_global_graph_pool = classmethod(lambda cls: None)
    CPUAttentionMetadataBuilder.supports_draft_decode_metadata_update = True
    CPUAttentionMetadataBuilder.update_draft_decode_metadata = _update_metadata
    compilation = speculator.vllm_config.compilation_config
    compilation.cudagraph_capture_sizes = sizes
    compilation.max_cudagraph_capture_size = max(sizes)
    speculator.supports_decode_metadata_update = True
    speculator.attn_cg_support = SimpleNamespace(
        min_cg_support=AttentionCGSupport.ALWAYS, min_cg_attn_backend=None
    )
    speculator.init_cudagraph_manager(CUDAGraphMode.FULL_DECODE_ONLY)
    # The first pass reads the target's metadata, which nothing refreshes here.
    speculator.prefill_cudagraph_manager = SpeculatorCudaGraphManager(
        speculator.vllm_config, speculator.device, CUDAGraphMode.NONE, 1
    )
    speculator.capture()
    return replayed


def _replay(
    forward: Callable[..., None], desc: Any, replayed: list[tuple[int, int]]
) -> Callable[[], None]:
    from vllm.config.compilation import CUDAGraphMode

    def replay() -> None:
        replayed.append((desc.uniform_token_count, desc.num_reqs))
        forward(CUDAGraphMode.NONE)

    return replay


def _update_metadata(builder: Any, metadata: Any) -> None:
    """Do on a CPU what GPU backends do inside a graph: plan the work for what buffers hold now."""
    from vllm import _custom_ops, envs

    metadata.scheduler_metadata = _custom_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(metadata.seq_lens),
        num_heads=builder.num_heads,
        num_kv_heads=builder.num_kv_heads,
        head_dim=builder.head_dim,
        seq_lens=metadata.seq_lens,
        dtype=builder.dtype,
        query_start_loc=metadata.query_start_loc,
        causal=metadata.causal,
        sliding_window_size=builder.window_size,
        isa=builder.isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        dynamic_causal=None,
        kv_cache_dtype=builder.kv_cache_dtype,
    )
