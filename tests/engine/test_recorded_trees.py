"""V2 engines grow and verify trees by recordings as they do eagerly."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.engine import StartEngine
from tests.support.runners import runners
from tests.support.spies import drafter
from tests.support.tiny_store import KIND, TinyStore
from tests.support.workloads import mixed_requests, serve_requests

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

REQUESTS = mixed_requests(KIND, 12, 6)
WIDTH = 4


@pytest.mark.parametrize("is_sibling", [False, True], ids=["head", "published model"])
@pytest.mark.parametrize("runner", runners("v2", "v2-overlay"))
def test_recorded_trees(
    engine: StartEngine, tiny: TinyStore, runner: str, is_sibling: bool
) -> None:
    """The same trees, in batches that vLLM pads; a published model's with their roots."""
    ours = engine(
        runner,
        process=f"recorded trees {is_sibling}",
        draft=tiny.sibling() if is_sibling else tiny.head(),
        num_draft_tokens=19,
        tree={"policy": "eagle2", "top_k": WIDTH},
        max_num_seqs=12,
        max_num_batched_tokens=96,
    )
    eager = ours.run(serve_requests, REQUESTS)
    # Trees of 1, 3 and 6 requests, and verification of 4 and 12.
    recorded, replayed = ours.run(_serve_recorded, [WIDTH, 3 * WIDTH, 6 * WIDTH])
    assert recorded.outputs() == eager.outputs()
    assert recorded.accepted() == eager.accepted()
    assert replayed >= {(WIDTH, 3), (WIDTH, 6), (1, 4)}


def _serve_recorded(llm: LLM, sizes: list[int]) -> tuple[Any, set[tuple[int, int]]]:
    """Serve by recordings of ``sizes`` tokens; return (rows a request, requests) of all replays.

    On a CPU a recording is the function itself, called again with what it was recorded with: static
    buffers, metadata and the padded number of requests.
    """
    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder as Builder
    from vllm.v1.worker.gpu import cudagraph_utils
    from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
        SpeculatorCudaGraphManager,
    )

    speculator, replayed = drafter(llm), set[tuple[int, int]]()

    def replay(forward: Callable[..., None], desc: Any) -> Callable[[], None]:
        def run() -> None:
            replayed.add((desc.uniform_token_count, desc.num_reqs))
            forward(CUDAGraphMode.NONE)

        return run

    def capture(manager: Any, create_forward_fn: Any, progress_bar_desc: str = "") -> None:
        for desc in manager._capture_descs.get(CUDAGraphMode.FULL, []):
            create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
            forward = create_forward_fn(desc, warmup=False)
            forward(CUDAGraphMode.NONE)
            manager.graphs[desc] = SimpleNamespace(replay=replay(forward, desc))
        manager._graphs_captured = True

    cudagraph_utils.CudaGraphManager.capture = capture
    CpuPlatform.get_global_graph_pool = classmethod(lambda cls: None)
    Builder.supports_draft_decode_metadata_update = True
    Builder.update_draft_decode_metadata = _update_metadata
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
    return serve_requests(llm, REQUESTS), replayed


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
