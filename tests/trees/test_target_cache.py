"""Accepted paths in the KV cache: vLLM's layouts, packed blocks, and what must stay as it is."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.support.operators import Record
from vllm_vispec.trees.target_cache import TargetCache
from vllm_vispec.utils.errors import ViSpecError

BLOCKS, SLOTS, HEADS, HEAD, PADDED = 6, 4, 2, 3, 8
Pack = Callable[[torch.Tensor], torch.Tensor]


class _Impl:
    """A backend that stores a block's elements in an order of its own.

    Args:
        pack: From a block's elements ``[N, K, 2 * P]`` to how they lie, ``[K, N, 2 * P]``.
    """

    tree_padding = SimpleNamespace(
        key_shape=(HEADS, HEAD, PADDED), head_size=HEAD, padded_size=PADDED
    )

    def __init__(self, pack: Pack) -> None:
        self._pack = pack
        numbers = torch.arange(SLOTS * HEADS * 2 * PADDED).view(SLOTS, HEADS, 2 * PADDED)
        self._order = pack(numbers)

    def store_padded(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        rows = torch.cat((_as_gpus_read(key), _as_gpus_read(value)), -1)
        for row, slot in zip(rows, slots.tolist(), strict=True):
            block = self.read(cache)[slot // SLOTS]
            block[slot % SLOTS] = row
            cache[slot // SLOTS] = self._pack(block)

    def read(self, cache: torch.Tensor) -> torch.Tensor:
        """Return all rows by block and slot, ``[B, N, K, 2 * P]``."""
        order_E = self._order.flatten()
        rows_BE = torch.zeros(len(cache), order_E.amax() + 1, dtype=cache.dtype)
        rows_BE[:, order_E] = cache.reshape(len(cache), -1)
        return rows_BE.view(len(cache), SLOTS, HEADS, 2 * PADDED)


def _as_gpus_read(rows_NKP: torch.Tensor) -> torch.Tensor:
    """Return what vLLM's operators for GPUs read: only the stride of tokens counts for them."""
    return rows_NKP.as_strided(rows_NKP.shape, (rows_NKP.stride(0), rows_NKP.shape[2], 1))


def _plain(block_NKC: torch.Tensor) -> torch.Tensor:
    return block_NKC.transpose(0, 1)


def _columns(block_NKC: torch.Tensor) -> torch.Tensor:
    """Keys column by column, as vectors read them; values row by row."""
    key, value = block_NKC.transpose(0, 1).split(PADDED, -1)
    both = torch.stack((key.transpose(1, 2).reshape(HEADS, -1), value.reshape(HEADS, -1)), 1)
    return both.reshape(HEADS, SLOTS, 2 * PADDED)


def _lossy(block_NKC: torch.Tensor) -> torch.Tensor:
    return block_NKC.transpose(0, 1).clone().index_fill_(-1, torch.tensor([0]), 0)


def _caches(layout: KVCacheLayout, num_layers: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return layers' caches ``[B, K, N, C]`` as vLLM cuts them out of one allocation."""
    shape = (num_layers, BLOCKS, HEADS, SLOTS, 2 * PADDED)
    whole = torch.empty([shape[dim] for dim in layout.stride_order], dtype=dtype)
    order = [layout.stride_order.index(dim) for dim in range(5)]
    return list(whole.permute(order))


def _layers(caches: Sequence[torch.Tensor], pack: Pack) -> list[Any]:
    impl = _Impl(pack)
    generator = torch.Generator().manual_seed(0)
    for cache in caches:
        cache.copy_(torch.randn(cache.shape, generator=generator))
    return [
        SimpleNamespace(
            layer_name=f"layer {number}",
            kv_cache=cache,
            impl=impl,
            attn_backend=SimpleNamespace(get_name=lambda: "SOME"),
        )
        for number, cache in enumerate(caches)
    ]


def _expected(
    layer: Any, slots: Sequence[int], moves: Sequence[tuple[int, int, bool]]
) -> torch.Tensor:
    """Return all rows of a layer after moves, one by one, of what was there before."""
    before = layer.impl.read(layer.kv_cache).flatten(0, 1)
    after = before.clone()
    for source, place, is_moved in moves:
        if is_moved and min(slots[source], slots[place]) >= 0:
            after[slots[place]] = before[slots[source]]
            after[slots[place], :, HEAD:PADDED] = 0
    return after


def _check(layers: Sequence[Any], expected: Sequence[torch.Tensor]) -> None:
    """Compare all rows but those of vLLM's null block."""
    for layer, rows in zip(layers, expected, strict=True):
        found = layer.impl.read(layer.kv_cache).flatten(0, 1)
        assert torch.equal(found[SLOTS:], rows[SLOTS:])


# Two requests: a path that moves by overlapping steps, one that stays; rows without drafts.
MOVES = [
    (0, 0, False),
    (2, 1, True),
    (3, 2, True),
    (6, 3, True),
    (3, 3, False),
    (7, 7, False),
    (8, 8, True),
    (9, 9, False),
    (11, 10, True),
]
ONE = [5, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23, -1]
OTHER = [12, 13, 14, 15, 4, 5, 6, 9, 16, 17, -1, 19]


def _move(cache: TargetCache, slots: Mapping[str, torch.Tensor]) -> None:
    source, place, is_moved = (torch.tensor(column) for column in zip(*MOVES, strict=True))
    cache.move(slots, source, place, is_moved)


@pytest.mark.parametrize("layout", KVCacheLayout)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout: KVCacheLayout, dtype: torch.dtype) -> None:
    """Every layer's own rows, at the slots of its cache group; whatever vLLM's layout is."""
    layers = _layers(_caches(layout, 4, dtype), _plain)
    one, other = torch.tensor(ONE), torch.tensor(OTHER)
    slots = {layer.layer_name: one for layer in layers[:3]} | {layers[3].layer_name: other}
    expected = [_expected(layer, slots[layer.layer_name].tolist(), MOVES) for layer in layers]
    assert not torch.equal(expected[0], layers[0].impl.read(layers[0].kv_cache).flatten(0, 1))
    _move(TargetCache(layers), slots)
    _check(layers, expected)


def _uneven() -> list[torch.Tensor]:
    caches = _caches(KVCacheLayout.LBNHC, 4, torch.float32)
    return [caches[0], caches[3], caches[1], *_caches(KVCacheLayout.LBNHC, 1, torch.float32)]


ROW_BYTES = len(MOVES) * HEADS * 2 * PADDED * 4


@pytest.mark.parametrize(
    ("caches", "pack", "max_bytes"),
    [
        # Where elements lie is learned from the backend's operator; exactly so in 16 bits.
        (_caches(KVCacheLayout.LBHNC, 3, torch.bfloat16), _columns, None),
        (_uneven(), _plain, None),
        (_caches(KVCacheLayout.LBNHC, 5, torch.float32), _plain, 2 * ROW_BYTES),
    ],
    ids=["packed blocks", "layers that lie unevenly", "many layers, in parts"],
)
def test_other_forms(
    caches: list[torch.Tensor], pack: Pack, max_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if max_bytes is not None:
        monkeypatch.setattr("vllm_vispec.trees.target_cache._MAX_BYTES", max_bytes)
    layers = _layers(caches, pack)
    slots = dict.fromkeys((layer.layer_name for layer in layers), torch.tensor(ONE))
    expected = [_expected(layer, ONE, MOVES) for layer in layers]
    _move(TargetCache(layers), slots)
    _check(layers, expected)


@pytest.mark.parametrize("pack", [_plain, _columns])
def test_a_move_is_static_and_short(pack: Pack) -> None:
    """The same operators whatever moves; as many for forty layers as for two."""
    records = []
    for num_layers in (2, 40):
        layers = _layers(_caches(KVCacheLayout.LBHNC, num_layers, torch.float32), pack)
        slots = {layer.layer_name: torch.tensor(ONE) for layer in layers}
        shared = dict.fromkeys(slots, torch.tensor(ONE))
        cache = TargetCache(layers)
        _move(cache, shared)
        record = Record()
        for place in ([0, 1, 2], [4, 5, 6], [0, 0, 0]):
            with record.watching("move"):
                index = torch.tensor(place)
                cache.move(shared, index, index, index > 0)
        assert record.violations == []
        assert all(ops == record.passes["move"][0] for ops in record.passes["move"])
        records.append(record.passes["move"][0])
    assert len(records[0]) == len(records[1])


def test_forms_that_cannot_be_moved_are_refused() -> None:
    layers = _layers(_caches(KVCacheLayout.LBHNC, 1, torch.float32), _lossy)
    with pytest.raises(ViSpecError, match=r"backend SOME stores.*choose another.*leave \"tree\""):
        _move(TargetCache(layers), {"layer 0": torch.tensor(ONE)})


def test_other_caches_are_found_and_old_ones_let_go() -> None:
    """vLLM measures memory with small caches and drops them."""
    layers = _layers(_caches(KVCacheLayout.LBNHC, 2, torch.float32), _plain)
    slots = dict.fromkeys((layer.layer_name for layer in layers), torch.tensor(ONE))
    cache = TargetCache(layers)
    _move(cache, slots)
    old = [weakref.ref(layer.kv_cache) for layer in layers]
    new = _layers(_caches(KVCacheLayout.LBHNC, 2, torch.float32), _plain)
    for layer, other in zip(layers, new, strict=True):
        layer.kv_cache = other.kv_cache
    gc.collect()
    assert [ref() for ref in old] == [None, None]
    expected = [_expected(layer, ONE, MOVES) for layer in layers]
    _move(cache, slots)
    _check(layers, expected)
