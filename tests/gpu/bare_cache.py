"""Accepted keys and values move inside the KV cache, eagerly and as a CUDA graph.

Shapes: B blocks, N slots of a block, K key/value heads, P padded head size, A moved tokens.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tests.gpu.bare_attention import milliseconds
from tests.gpu.bare_trees import no_waiting, record
from tests.gpu.setup import Setup
from vllm_vispec.trees.target_cache import TargetCache

BLOCK, HEAD, PADDED = 16, 128, 152
NUM_STEPS = 6


class _Impl:
    """Stores keys and values as vLLM's GPU backends do: side by side, by slot."""

    def __init__(self, num_kv_heads: int) -> None:
        self.tree_padding = SimpleNamespace(
            key_shape=(num_kv_heads, HEAD, PADDED), head_size=HEAD, padded_size=PADDED
        )

    def store_padded(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        rows = cache.transpose(1, 2)
        assert key.is_contiguous(), "GPU operators take a token's heads as one piece"
        assert value.is_contiguous(), "GPU operators take a token's heads as one piece"
        rows[slots // BLOCK, slots % BLOCK] = torch.cat((key, value), dim=-1)


def run_cache(setup: Setup) -> Any:
    """Moves on the device equal those on the CPU, wait for nothing, and can be recorded."""
    num_layers, num_requests = (28, 64) if setup.on_gpu else (3, 4)
    num_blocks = 1 + 2 * num_requests
    shape = num_layers, num_blocks, 4, BLOCK, 2 * PADDED
    content = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    mine, theirs = content.to(setup.device), content.clone()
    cache, expected = _cache(mine), _cache(theirs)
    device = torch.device(setup.device)
    inputs = [_inputs(num_requests, seed) for seed in range(NUM_STEPS)]
    on_device = [[part.to(device) for part in step] for step in inputs]
    _move(cache, on_device[0])  # finds out how the caches lie
    with no_waiting(setup):
        _move(cache, on_device[1])
    for step in inputs[:2]:
        _move(expected, step)
    _require_equal(mine, theirs, "eager")
    static = [part.clone() for part in on_device[0]]
    replay, _ = record(lambda: _move(cache, static), setup)
    mine.copy_(theirs)  # recording may have moved something
    for index in range(2, NUM_STEPS):
        for part, given in zip(static, on_device[index], strict=True):
            part.copy_(given)
        replay()
        _move(expected, inputs[index])
        _require_equal(mine, theirs, f"replay {index}")
    return {
        "layers": num_layers,
        "requests": num_requests,
        "eager ms": round(milliseconds(lambda: _move(cache, static), setup), 3),
        "replayed ms": round(milliseconds(replay, setup), 3),
    }


def _cache(content: torch.Tensor) -> TargetCache:
    """Return layers over one allocation, as vLLM makes it."""
    backend = SimpleNamespace(get_name=lambda: "stand-in")
    layers = [
        SimpleNamespace(
            layer_name="layer", kv_cache=part, impl=_Impl(part.shape[1]), attn_backend=backend
        )
        for part in content
    ]
    return TargetCache(layers)


def _inputs(num_requests: int, seed: int) -> list[torch.Tensor]:
    """Return slots of the batch's tokens, sources, places and what is moved."""
    generator = torch.Generator().manual_seed(seed)
    levels, nodes = 5, 30
    first_R1 = BLOCK + torch.arange(num_requests)[:, None] * 2 * BLOCK
    slots_T = (first_R1 + torch.arange(nodes)).flatten()
    order = torch.rand(num_requests, nodes - 1, generator=generator).argsort(1)
    path = 1 + order[:, : levels - 1].sort(1).values
    start_R1 = torch.arange(num_requests)[:, None] * nodes
    source = torch.cat((start_R1, start_R1 + path), dim=1).flatten()
    place = (start_R1 + torch.arange(levels)).flatten()
    is_moved = torch.rand(source.shape, generator=generator) < 0.7
    return [slots_T, source, place, is_moved]


def _move(cache: TargetCache, step: list[torch.Tensor]) -> None:
    slots_T, *others = step
    cache.move({"layer": slots_T}, *others)


def _require_equal(mine: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    # Block 0 is vLLM's null block: nothing in it is read.
    if not torch.equal(mine[:, 1:].cpu(), theirs[:, 1:]):
        raise AssertionError(f"{what}: the caches differ")
