"""Attention over padded heads, with masked positions and with tree codes, against fp32.

Every kernel reads one paged cache, as vLLM lays it out: blocks of 16 tokens, keys and values of a
head side by side.

Shapes: R requests, T query tokens of the batch, U of one request, C keys of one request, H heads,
K key/value heads, h head size, P padded head size, B blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tests.gpu.setup import TREE, Setup
from tests.gpu.vllm_files import load_flash_attention, load_triton_attention
from vllm_vispec.spec_decode.row_table import MASK_CHANNEL
from vllm_vispec.trees.codes import encode, word_tables
from vllm_vispec.trees.grow import DraftTree, TreeGrower

BLOCK = 16
TOP_K = TREE.top_k
CODES = TREE.num_channels
# Largest error allowed against fp32, of outputs whose size is about one.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Shape:
    """One batch: R requests of U query tokens behind C - U cached ones."""

    num_requests: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    padded_size: int


@dataclass(frozen=True)
class Batch:
    """Inputs of a kernel, and what it should return.

    Attributes:
        query: ``[T, H, P]``.
        cache: ``[B, 16, K, 2 P]``.
        block_table: int32 ``[R, C / 16]``.
        expected: float32 ``[T, H, h]``.
    """

    shape: Shape
    query: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor
    expected: torch.Tensor

    @property
    def scale(self) -> float:
        """Attention's scale; padding does not change it."""
        return float(self.shape.head_size**-0.5)

    def keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views ``[B, 16, K, P]`` of the cache, as vLLM's backends take them."""
        key, value = self.cache.split(self.shape.padded_size, dim=-1)
        return key, value


Kernel = Callable[[Batch], torch.Tensor]


def run_torch(setup: Setup) -> Any:
    """Ask every kernel that torch has for this device."""
    from torch.nn.attention import SDPBackend

    backends = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    if setup.on_gpu:
        backends += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    found: dict[str, Any] = {}
    for backend in backends:
        try:
            found[backend.name] = _check_all(setup, _sdpa(backend))
        except RuntimeError as error:
            # A kernel that torch does not have here is no fault of ours; a wrong result is.
            found[backend.name] = f"not available: {error}"[:300]
    _require(any(isinstance(result, dict) for result in found.values()), found)
    return found


def run_triton(setup: Setup) -> Any:
    """Ask vLLM's Triton kernel, its scratch guarded on both sides."""
    module = load_triton_attention(setup)
    found = _check_all(setup, partial(_triton, module, split=False))
    split = _check_all(setup, partial(_triton, module, split=True), max_queries=1)
    return found | {f"split, {name}": error for name, error in split.items()}


def run_fa3(setup: Setup) -> Any:
    """Ask vLLM's FlashAttention 3, with and without a fixed number of splits."""
    module = load_flash_attention(setup)
    found: dict[str, Any] = {}
    for splits in (0, 32):
        attend = partial(_fa3, module, num_splits=splits)
        found[f"{splits} splits"] = _check_all(setup, attend)
    return found


def run_fa3_fp8(setup: Setup) -> Any:
    """See that fp8 needs head sizes of 16s: 136 is refused, 144 attends."""
    module = load_flash_attention(setup)
    found: dict[str, Any] = {}
    for padded in (136, 144):
        batch = _masked(Shape(4, 1, 512, 28, 4, 128, padded), torch.bfloat16, setup.device, 7)
        try:
            output = _fa3(module, batch, num_splits=0, cache_dtype=torch.float8_e4m3fn)
            found[str(padded)] = _error(output, batch)
        except RuntimeError as error:
            found[str(padded)] = f"refused: {error}"[:300]
    _require(isinstance(found["136"], str), found)
    _require(isinstance(found["144"], float) and found["144"] < 0.25, found)
    return found


def run_head_size_cost(setup: Setup) -> Any:
    """Time torch's attention at padded head sizes; a number without a verdict."""
    dtype, length = (torch.bfloat16, 4096) if setup.on_gpu else (torch.float32, 64)
    found: dict[str, float] = {}
    for size in (128, 136, 144, 152, 160, 192, 256):
        query_1HCP = torch.randn(1, 28, length, size, dtype=dtype, device=setup.device)
        key_1HCP, value_1HCP = torch.randn_like(query_1HCP), torch.randn_like(query_1HCP)

        def attend(q: Any = query_1HCP, k: Any = key_1HCP, v: Any = value_1HCP) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        found[f"prefill of {length}, heads of {size}, ms"] = round(milliseconds(attend, setup), 3)
    return found


def milliseconds(function: Callable[[], Any], setup: Setup, repeats: int = 20) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(repeats if setup.on_gpu else 2):
        if setup.on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if setup.on_gpu:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return sorted(times)[len(times) // 2]


def _check_all(setup: Setup, attend: Kernel, max_queries: int | None = None) -> dict[str, float]:
    """Return the largest error by case.

    Raises:
        AssertionError: One is too large, or padding comes back as something else than zero.
    """
    found: dict[str, float] = {}
    dtypes = (torch.bfloat16, torch.float16) if setup.on_gpu else (torch.float32,)
    for dtype in dtypes:
        for name, shape, build in _cases(setup):
            if max_queries is not None and shape.num_queries > max_queries:
                continue
            batch = build(shape, dtype, setup.device, len(found))
            output = attend(batch)
            error = _error(output, batch)
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = round(error, 9)
            _require(error <= TOLERANCE[dtype], found)
            padding = output[..., shape.head_size :]
            _require(bool((padding == 0).all()), f"{name}: padding of the output is not zero")
    return found


def _cases(setup: Setup) -> list[tuple[str, Shape, Callable[..., Batch]]]:
    if not setup.on_gpu:
        return [
            ("masked 64 to 72, 1 query", Shape(3, 1, 48, 2, 1, 64, 72), _masked),
            ("masked 64 to 72, 5 queries", Shape(2, 5, 48, 2, 2, 64, 72), _masked),
            (f"tree 64 to {64 + CODES}", Shape(1, 30, 64, 2, 1, 64, 64 + CODES), _tree),
        ]
    cases: list[tuple[str, Shape, Callable[..., Batch]]] = []
    for kv_heads in (28, 4):
        for head, padded in ((128, 136), (128, 144), (128, 192), (64, 72), (96, 104)):
            for queries in (1, 5, 2000):
                shape = Shape(4, queries, 2048, 28, kv_heads, head, padded)
                name = f"masked {head} to {padded}, {queries} queries, {kv_heads} KV heads"
                cases.append((name, shape, _masked))
        for padded in (128 + CODES, 160):
            shape = Shape(4, 30, 2048, 28, kv_heads, 128, padded)
            cases.append((f"tree 128 to {padded}, {kv_heads} KV heads", shape, _tree))
    return cases


def _masked(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Batch:
    """Return a batch of a draft: a third of the cached positions is masked."""
    generator = torch.Generator().manual_seed(seed)
    is_masked_RC = torch.rand(shape.num_requests, shape.num_keys, generator=generator) < 1 / 3
    is_masked_RC[:, 0] = False
    is_masked_RC[:, -shape.num_queries :] = False
    own = slice(shape.head_size, None)
    query, key, value = _random(shape, dtype, generator)
    query[..., own] = MASK_CHANNEL
    key[..., own] = -MASK_CHANNEL * is_masked_RC[..., None, None].to(dtype)
    # Whatever is there, nothing of it may be seen.
    value[is_masked_RC] *= 100
    return _batch(shape, query, key, value, ~is_masked_RC[:, None], device)


def _tree(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Batch:
    """Return a batch of a target: a root and the nodes of a tree, each sees its ancestors."""
    generator = torch.Generator().manual_seed(seed)
    tree = _random_tree(shape.num_queries - 1, generator)
    own = slice(shape.head_size, shape.head_size + CODES)
    query, key, value = _random(shape, dtype, generator)
    # The root is read by all and has no code.
    for rows, table in zip(
        (query, key), word_tables(TOP_K, dtype, torch.device("cpu")), strict=True
    ):
        rows[:, 1 - shape.num_queries :, :, own] = encode(tree.path[0], table)[None, :, None]
    sees_UC = torch.ones(shape.num_queries, shape.num_keys, dtype=torch.bool)
    first = shape.num_keys - shape.num_queries
    sees_UC[:, first + 1 :] = False
    for node, parent in enumerate(tree.parent[0].tolist(), start=1):
        sees_UC[node, first:] = sees_UC[parent, first:]
        sees_UC[node, first + node] = True
    return _batch(shape, query, key, value, sees_UC[None], device)


def _random_tree(num_nodes: int, generator: torch.Generator) -> DraftTree:
    grower = TreeGrower(TREE)
    grower.start_trees(torch.randn(1, 64, generator=generator))
    for _ in range(TREE.depth):
        grower.grow_level(torch.randn(1, TOP_K, 64, generator=generator))
    return grower.finish_trees(num_nodes)


def _random(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries ``[R, U, H, P]``, keys and values ``[R, C, K, P]``, their padding zero."""
    tensors = []
    for rows, heads in (
        (shape.num_queries, shape.num_heads),
        (shape.num_keys, shape.num_kv_heads),
        (shape.num_keys, shape.num_kv_heads),
    ):
        size = shape.num_requests, rows, heads, shape.padded_size
        tensor = torch.zeros(size, dtype=dtype)
        own = torch.randn(*size[:-1], shape.head_size, generator=generator)
        tensor[..., : shape.head_size] = own.to(dtype)
        tensors.append(tensor)
    query, key, value = tensors
    return query, key, value


def _batch(
    shape: Shape,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sees: torch.Tensor,
    device: str,
) -> Batch:
    """Page keys and values, blocks in random order, and attend in fp32 on the device."""
    query, key, value, sees = (tensor.to(device) for tensor in (query, key, value, sees))
    places = torch.arange(shape.num_keys, device=device)
    queries = places[-shape.num_queries :]
    sees_RUC = sees & (places <= queries[:, None])
    pages = shape.num_keys // BLOCK
    # Block 0 is vLLM's null block.
    order = 1 + torch.randperm(shape.num_requests * pages, device=device)
    cache = torch.zeros(len(order) + 1, BLOCK, shape.num_kv_heads, 2 * shape.padded_size)
    cache = cache.to(device, query.dtype)
    both = torch.cat((key, value), dim=-1)
    cache[order] = both.view(-1, BLOCK, *both.shape[2:])
    own = slice(shape.head_size)
    group = shape.num_heads // shape.num_kv_heads
    expected = torch.empty(*query.shape[:-1], shape.head_size, device=device)
    for index in range(shape.num_requests):
        key_HCh = key[index, ..., own].float().repeat_interleave(group, dim=1).transpose(0, 1)
        value_HCh = value[index, ..., own].float().repeat_interleave(group, dim=1).transpose(0, 1)
        query_HUh = query[index, ..., own].float().transpose(0, 1)
        logits_HUC = query_HUh @ key_HCh.mT * shape.head_size**-0.5
        hidden_UC = ~sees_RUC[index if len(sees_RUC) > 1 else 0]
        logits_HUC = logits_HUC.masked_fill(hidden_UC, float("-inf"))
        expected[index] = (logits_HUC.softmax(-1) @ value_HCh).transpose(0, 1)
    table = order.view(shape.num_requests, pages).int()
    return Batch(shape, query.flatten(0, 1), cache, table, expected.flatten(0, 1))


def _error(output: torch.Tensor, batch: Batch) -> float:
    own = output[..., : batch.shape.head_size].float()
    return float((own - batch.expected).abs().max())


def _sdpa(backend: Any) -> Kernel:
    from torch.nn.attention import sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    def attend(batch: Batch) -> torch.Tensor:
        shape = batch.shape
        key, value = batch.keys_and_values()
        size = shape.num_requests, shape.num_keys, shape.num_kv_heads, shape.padded_size
        group = shape.num_heads // shape.num_kv_heads
        table = batch.block_table.long()
        key_RHCP, value_RHCP = (
            part[table].reshape(size).repeat_interleave(group, dim=2).transpose(1, 2)
            for part in (key, value)
        )
        query_RHUP = batch.query.unflatten(0, (shape.num_requests, -1)).transpose(1, 2)
        mask = causal_lower_right(shape.num_queries, shape.num_keys)
        with sdpa_kernel(backend):
            output = torch.nn.functional.scaled_dot_product_attention(
                query_RHUP, key_RHCP, value_RHCP, attn_mask=mask, scale=batch.scale
            )
        return output.transpose(1, 2).flatten(0, 1)

    return attend


def _fa3(
    module: Any, batch: Batch, *, num_splits: int, cache_dtype: torch.dtype | None = None
) -> torch.Tensor:
    shape, (key, value) = batch.shape, batch.keys_and_values()
    query = batch.query
    descale = {}
    if cache_dtype is not None:
        query = query.to(cache_dtype)
        key, value = batch.cache.to(cache_dtype).split(shape.padded_size, dim=-1)
        one = torch.ones(shape.num_requests, shape.num_kv_heads, device=query.device)
        descale = {"q_descale": one, "k_descale": one, "v_descale": one}
    return module.flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        max_seqlen_q=shape.num_queries,
        cu_seqlens_q=_starts(batch),
        max_seqlen_k=shape.num_keys,
        seqused_k=_lengths(batch),
        softmax_scale=batch.scale,
        causal=True,
        block_table=batch.block_table,
        num_splits=num_splits,
        fa_version=3,
        **descale,
    )


def _triton(module: Any, batch: Batch, *, split: bool) -> torch.Tensor:
    """Call vLLM's kernel; with ``split`` its keys are split among programs, which need scratch."""
    shape, (key, value) = batch.shape, batch.keys_and_values()
    scratch: dict[str, Any] = {}
    guard = torch.empty(0)
    if split:
        num_rows, segments = batch.query.shape[0], 16
        width = 1 << (shape.padded_size - 1).bit_length()
        size = num_rows * shape.num_heads * segments
        guard = torch.full((size * width + 4096,), 7.25, device=batch.query.device)
        sums = torch.zeros(2, num_rows, shape.num_heads, segments, device=batch.query.device)
        scratch = {
            "seq_threshold_3D": num_rows,
            "num_par_softmax_segments": segments,
            "softmax_segm_output": guard[: size * width].view(
                num_rows, shape.num_heads, segments, width
            ),
            "softmax_segm_max": sums[0],
            "softmax_segm_expsum": sums[1],
        }
    output = torch.empty_like(batch.query)
    module.unified_attention(
        q=batch.query,
        k=key,
        v=value,
        out=output,
        cu_seqlens_q=_starts(batch),
        max_seqlen_q=shape.num_queries,
        seqused_k=_lengths(batch),
        max_seqlen_k=shape.num_keys,
        softmax_scale=batch.scale,
        causal=True,
        window_size=(-1, -1),
        block_table=batch.block_table,
        softcap=0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        **scratch,
    )
    if split:
        _require(bool((guard[-4096:] == 7.25).all()), "the kernel wrote behind its scratch")
    return output


def _starts(batch: Batch) -> torch.Tensor:
    requests = torch.arange(batch.shape.num_requests + 1, device=batch.query.device)
    return (requests * batch.shape.num_queries).int()


def _lengths(batch: Batch) -> torch.Tensor:
    return torch.full_like(_starts(batch)[1:], batch.shape.num_keys)


def _require(holds: bool, found: Any) -> None:
    if not holds:
        raise AssertionError(str(found))
