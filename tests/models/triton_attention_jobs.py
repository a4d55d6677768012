"""vLLM's Triton attention, interpreted, on padded heads: what it computes and where it writes.

Shapes: T query rows, S keys of a request, H heads, K key/value heads, h head size, P padded size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from vllm_vispec.spec_decode.row_table import MASK_CHANNEL
from vllm_vispec.trees.codes import UNUSED, encode, word_tables
from vllm_vispec.trees.settings import TreeSettings

HEADS, KV_HEADS, BLOCK, NUM_KEYS = 2, 1, 16, 40
GUARD = 7.25
TREE = TreeSettings()
# Root, its children, and children of the first two and of a grandchild: a branch for each level.
PATHS = ((), (0,), (1,), (2,), (0, 0), (0, 3), (1, 0), (0, 0, 1), (0, 3, 7), (0, 0, 1, 5))


@dataclass(frozen=True)
class Batch:
    """Requests of equal lengths, and which keys each query sees besides causal attention.

    Attributes:
        query_THP, key_SKP, value_SKP: With the channels in them; keys and values of all requests.
        visible_TS: Whether a query sees a key of its own request.
        num_requests: How many there are.
        head_size: h; scores are divided by its root.
    """

    query_THP: torch.Tensor
    key_SKP: torch.Tensor
    value_SKP: torch.Tensor
    visible_TS: torch.Tensor
    num_requests: int
    head_size: int


def kernels(dtypes: Sequence[str]) -> list[dict[str, Any]]:
    """Return error, leak and writes outside the scratch for every batch and dtype."""
    return list(_kernels(dtypes))


def _kernels(dtypes: Sequence[str]) -> Iterator[dict[str, Any]]:
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder

    from vllm_vispec.compat.patching import patch
    from vllm_vispec.models.padded_heads import init_triton_builder

    _let_dots_take_bfloat16()
    cases: tuple[tuple[str, Any, dict[str, int]], ...] = (
        ("one-token passes", masked_batch, {"num_requests": 4, "num_queries": 1}),
        ("first passes", masked_batch, {"num_requests": 2, "num_queries": 5}),
        ("a prompt", masked_batch, {"num_requests": 1, "num_queries": 40}),
        ("a tree", tree_batch, {}),
    )
    # First as vLLM has it, then as an engine of ours has it.
    for fits in (False, True):
        make_builder.cache_clear()
        if fits:
            patch(TritonAttentionMetadataBuilder, "__init__", init_triton_builder)
        for head_size in (64, 128) if fits else (128,):
            for name in dtypes if fits else dtypes[:1]:
                dtype = getattr(torch, name)
                for case, make, settings in cases if fits else cases[:1]:
                    if make is tree_batch and dtype.itemsize == 1:
                        continue
                    # As the draft's and the target's layers have it with this cache.
                    size = head_size + (24 if make is tree_batch else 8 * 2 // dtype.itemsize)
                    batch = make(head_size, size, dtype, **settings)
                    yield {"case": case, "head": size, "dtype": name, "fits": fits} | run(batch)


def masked_batch(
    head_size: int, padded: int, dtype: torch.dtype, num_requests: int, num_queries: int
) -> Batch:
    """Return requests whose keys 3 to 17 but one are masked, as a draft's image rows are."""
    query, key, value = _random(head_size, padded, num_requests, num_queries, NUM_KEYS)
    hole_S = torch.zeros(NUM_KEYS, dtype=torch.bool)
    hole_S[3:18] = True
    hole_S[9] = False
    query[..., head_size:] = MASK_CHANNEL
    key.view(num_requests, NUM_KEYS, KV_HEADS, padded)[:, hole_S, :, head_size:] = -MASK_CHANNEL
    causal = torch.ones(num_queries, NUM_KEYS, dtype=torch.bool).tril(NUM_KEYS - num_queries)
    visible_TS = (causal & ~hole_S).repeat(num_requests, 1)
    return Batch(
        query.to(dtype), key.to(dtype), value.to(dtype), visible_TS, num_requests, head_size
    )


def tree_batch(head_size: int, padded: int, dtype: torch.dtype) -> Batch:
    """Return one request whose last rows are a tree behind 30 plain keys, codes and all."""
    levels, channels = TREE.levels, TREE.num_channels
    num_nodes, num_keys = len(PATHS), 30 + len(PATHS)
    query, key, value = _random(head_size, padded, 1, num_nodes, num_keys)
    path = torch.tensor([[*path, *[UNUSED] * (levels - len(path))] for path in PATHS])
    query_table, key_table = word_tables(TREE.top_k, torch.float32, torch.device("cpu"))
    query[..., head_size : head_size + channels] = encode(path, query_table).unsqueeze(1)
    key[30:, :, head_size : head_size + channels] = encode(path, key_table).unsqueeze(1)
    visible_TS = torch.ones(num_nodes, num_keys, dtype=torch.bool)
    visible_TS[:, 30:] = torch.tensor([[a == b[: len(a)] for a in PATHS] for b in PATHS])
    return Batch(query.to(dtype), key.to(dtype), value.to(dtype), visible_TS, 1, head_size)


def run(batch: Batch) -> dict[str, Any]:
    """Return how far vLLM's kernel is from a masked softmax, and what it did that it must not."""
    found, outside = attend(batch, batch.value_SKP)
    wanted = reference(batch)
    # Whatever a key's value is, not a bit changes for the queries that do not see it.
    hidden_TS = ~batch.visible_TS
    column = int(hidden_TS.sum(0).argmax())
    other = batch.value_SKP.float()
    other.view(batch.num_requests, -1, KV_HEADS, other.shape[-1])[:, column] = 400.0
    rows = hidden_TS[:, column]
    changed, _ = attend(batch, other.to(batch.value_SKP.dtype))
    return {
        "error": float((found.float() - wanted).abs().max()),
        "hidden": int(rows.sum()),
        "leaks": not torch.equal(changed[rows], found[rows]),
        "outside": outside,
    }


def attend(batch: Batch, value_SKP: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the kernel's result ``[T, H, P]``, and how many floats it wrote behind its scratch."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    num_rows, _, padded = batch.query_THP.shape
    num_requests = batch.num_requests
    num_keys, num_queries = batch.key_SKP.shape[0] // num_requests, num_rows // num_requests
    num_blocks = -(-num_keys // BLOCK)
    cache = torch.zeros(
        (num_requests * num_blocks + 1, BLOCK, KV_HEADS, 2 * padded), dtype=value_SKP.dtype
    )
    for half, rows in enumerate((batch.key_SKP, value_SKP)):
        slots = cache[1:, ..., half * padded : (half + 1) * padded]
        by_request = slots.reshape(num_requests, num_blocks * BLOCK, KV_HEADS, padded)
        by_request[:, :num_keys] = rows.view(num_requests, num_keys, KV_HEADS, padded)
        slots.copy_(by_request.view_as(slots))
    key, value = cache.split(padded, dim=-1)
    builder = make_builder(padded, batch.head_size)
    guarded = torch.full((2, builder.softmax_segm_output.numel()), GUARD)
    is_fp8 = batch.query_THP.dtype.itemsize == 1
    out = torch.zeros_like(batch.query_THP, dtype=torch.float16 if is_fp8 else None)
    one = torch.ones(num_requests, KV_HEADS) if is_fp8 else None
    unified_attention(
        q=batch.query_THP,
        k=key,
        v=value,
        out=out,
        cu_seqlens_q=torch.arange(num_requests + 1).int() * num_queries,
        max_seqlen_q=num_queries,
        seqused_k=torch.full((num_requests,), num_keys).int(),
        max_seqlen_k=num_keys,
        softmax_scale=batch.head_size**-0.5,
        causal=True,
        window_size=(-1, -1),
        block_table=torch.arange(1, len(cache)).view(num_requests, num_blocks).int(),
        softcap=0,
        q_descale=one,
        k_descale=one,
        v_descale=one,
        seq_threshold_3D=builder.seq_threshold_3D,
        num_par_softmax_segments=builder.num_par_softmax_segments,
        softmax_segm_output=guarded[0].view_as(builder.softmax_segm_output),
        softmax_segm_max=builder.softmax_segm_max,
        softmax_segm_expsum=builder.softmax_segm_expsum,
    )
    return out, int((guarded[1] != GUARD).sum())


@lru_cache
def make_builder(padded: int, head_size: int) -> Any:
    """Return vLLM's metadata builder for layers of ``padded`` channels, the model's being fewer."""
    from vllm.config import VllmConfig
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    config: Any = VllmConfig()
    config.scheduler_config.max_num_seqs = 4
    config.model_config = SimpleNamespace(
        get_num_attention_heads=lambda _: HEADS,
        # So many that scratch is for four requests, all of which it is then used up by.
        get_num_kv_heads=lambda _: 32,
        get_head_size=lambda: head_size,
        rswa_window=None,
    )
    spec = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=padded, dtype=torch.float16
    )
    return TritonAttentionMetadataBuilder(spec, [], config, torch.device("cpu"))


def reference(batch: Batch) -> torch.Tensor:
    """Return a masked softmax in float32 over the model's own channels, ``[T, H, P]``."""
    rows = []
    queries = batch.query_THP.float().chunk(batch.num_requests)
    keys, values = (x.float().chunk(batch.num_requests) for x in (batch.key_SKP, batch.value_SKP))
    masks = batch.visible_TS.chunk(batch.num_requests)
    for query, key, value, mask in zip(queries, keys, values, masks, strict=True):
        size = batch.head_size
        score = torch.einsum("thp,skp->hts", query[..., :size], key[..., :size]) * size**-0.5
        weight = score.masked_fill(~mask, float("-inf")).softmax(-1)
        rows.append(torch.einsum("hts,skp->thp", weight, value))
    return torch.cat(rows)


def _random(
    head_size: int, padded: int, requests: int, queries: int, keys: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values in float32, zero beyond ``h``."""
    torch.manual_seed(0)
    sizes = ((requests * queries, HEADS), *[(requests * keys, KV_HEADS)] * 2)
    made = [F.pad(torch.randn(*size, head_size), (0, padded - head_size)) for size in sizes]
    return made[0], made[1], made[2]


def _let_dots_take_bfloat16() -> None:
    """Triton's interpreter multiplies the bits of such numbers as integers; a device does not."""
    import numpy as np
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widen(operand: Any) -> Any:
        if operand.dtype.scalar != bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), float32)

    def create_dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        return multiply(self, widen(left), widen(right), *rest)

    InterpreterBuilder.create_dot = create_dot
