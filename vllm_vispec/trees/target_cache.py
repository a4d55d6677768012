"""Accepted keys and values move to the front inside the target's KV cache.

A node's key carries its code and lies in the node's slot.  Once a path is accepted, its keys and
values are copied to consecutive slots and their codes are zeroed.  The cache then is what plain
decoding would have left, so prefix caching, preemption and KV connectors need to know nothing of
trees.  Nothing is kept beside the cache.

vLLM's backends have one cache ``[B, K, N, 2 * P]`` a layer, a slot's key before its value.  Most
of them store it like that.  CPU_ATTN packs keys inside a block as its kernel for the machine and
dtype reads them, and says nowhere how.  So each backend's own operator is tried once: it stores
numbers in a scratch block, and where a number comes to lie is where that element always lies.

Shapes: G layers, B blocks, N slots of a block, E elements of a block, A places of accepted paths,
T tokens of a batch, K key/value heads, h head size, P padded head size, C = 2 * P.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from vllm_vispec.utils.errors import ViSpecError

# Rows of so many layers are copied at a time that what is gathered stays below this.
_MAX_BYTES = 128 * 2**20
# Integers below 128 are exact in every dtype that caches have.
_DIGIT_BITS = 7


class _Layers(NamedTuple):
    """Layers whose caches lie evenly in one allocation.

    Attributes:
        first: The layer that lies first.
        index: int64 ``[G]``; 0 to G - 1.
        stride: Elements from one layer to the next.
        elements: int64 ``[N, K, C]``; where in its block each element of a slot lies.  None: where
            the cache's strides say.
    """

    first: Any
    index: torch.Tensor
    stride: int
    elements: torch.Tensor | None


class TargetCache:
    """The KV cache of the target's layers.

    Args:
        layers: vLLM's `Attention` layers, padded; those that store keys.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._bound: list[_Layers] = []
        self._bound_to: tuple[Any, ...] = ()

    def move(
        self,
        slot_mapping: Mapping[str, torch.Tensor],
        source: torch.Tensor,
        place: torch.Tensor,
        is_moved: torch.Tensor,
    ) -> None:
        """Copy accepted tokens to where plain decoding would have them, without their codes.

        Everything is read before anything is written, sizes depend on the arguments' shapes alone
        and nothing is read back, so that a graph can record it.  Only the first call after caches
        were allocated looks at them from the host: it must not be recorded.

        Args:
            slot_mapping: For each layer the slots ``[T]`` of the batch.
            source: int64 ``[A]``; which tokens of the batch.
            place: int64 ``[A]``; the tokens of the batch whose slots they take, each at most once.
            is_moved: bool ``[A]``; others are left alone, and so is what has no slot.
        """
        tokens_2A = torch.stack((source, place))
        slots: dict[int, torch.Tensor] = {}
        for layers in self._bind(slot_mapping):
            slots_T = slot_mapping[layers.first.layer_name]
            # Layers of one cache group share the tensor.
            slots_2A = slots.get(id(slots_T))
            if slots_2A is None:
                slots_2A = slots_T[tokens_2A].long()
                is_real_A = is_moved & (slots_2A.amin(0) >= 0)
                # Slot 0 lies in vLLM's null block, which holds no token: all else is done there.
                slots_2A = slots[id(slots_T)] = slots_2A * is_real_A
            _move(layers, slots_2A)

    def _bind(self, slot_mapping: Mapping[str, torch.Tensor]) -> list[_Layers]:
        """Return how the caches lie; found anew when there are others."""
        # Addresses, not tensors: vLLM drops the caches with which it measures memory.
        caches = (layer.kv_cache for layer in self._layers)
        bound_to = tuple((cache.data_ptr(), *cache.shape) for cache in caches)
        if bound_to != self._bound_to:
            self._bound = list(_even_layers(self._layers, slot_mapping))
            self._bound_to = bound_to
        return self._bound


def _even_layers(
    layers: Sequence[Any], slot_mapping: Mapping[str, torch.Tensor]
) -> Iterator[_Layers]:
    """Group layers of one form, cache group and allocation; one by one where they lie unevenly."""
    alike: dict[Any, list[Any]] = defaultdict(list)
    for layer in layers:
        cache, padding = layer.kv_cache, layer.impl.tree_padding
        form = type(layer.impl), padding.key_shape, cache.dtype, cache.shape, cache.stride()
        place = id(slot_mapping[layer.layer_name]), cache.untyped_storage().data_ptr()
        alike[form, place].append(layer)
    for group in alike.values():
        elements = find_elements(group[0])
        group.sort(key=lambda layer: layer.kv_cache.storage_offset())
        offsets = [layer.kv_cache.storage_offset() for layer in group]
        strides = {after - before for before, after in pairwise(offsets)}
        index = torch.arange(len(group), device=group[0].kv_cache.device)
        if len(strides) <= 1:
            yield _Layers(group[0], index, sum(strides), elements)
        else:
            yield from (_Layers(layer, index[:1], 0, elements) for layer in group)


def _move(layers: _Layers, slots_2A: torch.Tensor) -> None:
    """Copy from slots to slots, ``[2, A]``, in all layers."""
    cache_BKNC, padding = layers.first.kv_cache, layers.first.impl.tree_padding
    num_slots, num_layers = cache_BKNC.shape[2], len(layers.index)
    block_2A, offset_2A = slots_2A // num_slots, slots_2A % num_slots
    if layers.elements is None:
        shape, stride = (num_layers, *cache_BKNC.shape), (layers.stride, *cache_BKNC.stride())
        rows = cache_BKNC.as_strided(shape, stride).transpose(2, 3)
        source, place = zip(block_2A, offset_2A, strict=True)
    else:
        shape = num_layers, cache_BKNC.shape[0], cache_BKNC[0].numel()
        rows = cache_BKNC.as_strided(shape, (layers.stride, cache_BKNC.stride(0), 1))
        elements_2AKC = layers.elements[offset_2A]
        source, place = zip(block_2A[..., None, None], elements_2AKC, strict=True)
    bytes_of_layer = slots_2A.shape[1] * cache_BKNC.shape[1] * cache_BKNC.shape[3] * rows.itemsize
    layers_at_a_time = max(1, _MAX_BYTES // max(1, bytes_of_layer))
    for index_G in layers.index.split(layers_at_a_time):
        index = index_G.view(-1, *(1 for _ in source[0].shape))
        moved_GAKC = rows[index, *source]
        # Accepted tokens are context now.  A code left in a key would mask it from the nodes of
        # the next tree, whose queries carry other code words.
        moved_GAKC[..., padding.head_size : padding.padded_size].zero_()
        rows[index, *place] = moved_GAKC
        # Else it lives until the next layers' rows have been gathered.
        del moved_GAKC


def find_elements(layer: Any) -> torch.Tensor | None:
    """Find where a layer's backend stores the elements of a slot, by storing numbers.

    Args:
        layer: vLLM's `Attention` layer, padded, with its cache.

    Returns:
        int64 ``[N, K, C]``, places within a block; None if the cache's strides say it.

    Raises:
        ViSpecError: A block is not keys and values in some order.
    """
    num_heads, _, padded_size = layer.impl.tree_padding.key_shape
    block_1KNC = torch.zeros_like(layer.kv_cache[:1])
    num_slots = block_1KNC.shape[2]
    slots_N = torch.arange(num_slots, device=block_1KNC.device)
    shape = num_slots, num_heads, 2 * padded_size
    number_NKC = torch.arange(num_slots * num_heads * 2 * padded_size).view(shape)
    found_KNC = torch.zeros(block_1KNC.shape[1:], dtype=torch.int64)
    # A digit at a time: 16 bits hold no large integers.
    for shift in range(0, max(1, number_NKC.numel() - 1).bit_length(), _DIGIT_BITS):
        digit_NKC = (number_NKC >> shift & (1 << _DIGIT_BITS) - 1).to(block_1KNC)
        # Operators for GPUs take a token's heads as one piece, as `PaddedRows` has them.
        key_NKP, value_NKP = (half.contiguous() for half in digit_NKC.split(padded_size, -1))
        layer.impl.store_padded(layer, key_NKP, value_NKP, block_1KNC, slots_N)
        found_KNC += block_1KNC[0].long().cpu() << shift
    if torch.equal(found_KNC.transpose(0, 1), number_NKC):
        return None
    place_E = torch.full((number_NKC.numel(),), -1)
    found_E = found_KNC.flatten()
    if layer.kv_cache[0].is_contiguous() and found_E.numel() == place_E.numel():
        place_E[found_E] = torch.arange(found_E.numel())
    if place_E.amin() < 0:
        raise ViSpecError(
            f"attention backend {layer.attn_backend.get_name()} stores keys and values in a form "
            'that tree cannot move; choose another --attention-backend, or leave "tree" out of the '
            "speculative config"
        )
    return place_E.view(shape).to(block_1KNC.device)
