"""Keys and values of the batch, kept until the accepted paths are known.

A node's key carries its code and lies in the node's slot.  Once a path is accepted its keys and
values are stored again, without codes, in consecutive slots, by the backend's own operator: the
cache then is what plain decoding would have left.  They are read from the buffers in which layers
pad them, one for each layer of the target; references to a layer's own tensors would not do,
compiled graphs use their memory again for the next layer.

Shapes: G layers of one shape, T tokens of a batch, A places of accepted paths, K key/value heads,
P padded head size.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from vllm_vispec.engine.trees.code_rows import CodeRows, Shape
from vllm_vispec.engine.trees.padded_rows import PaddedRows


class _Group(NamedTuple):
    """Layers whose heads have one shape, and their buffers, one for each layer."""

    layers: Sequence[Any]
    key: PaddedRows
    value: PaddedRows


class KeptKeys:
    """What the layers of the target stored in the current pass.

    Args:
        codes: The engine's buffers.
        layers: vLLM's `Attention` layers of the target, padded; from now on each fills a buffer
            of its own with keys and values.
    """

    def __init__(self, codes: CodeRows, layers: Sequence[Any]) -> None:
        by_shape: dict[Shape, list[Any]] = defaultdict(list)
        for layer in layers:
            by_shape[layer.impl.tree_padding.key_shape].append(layer)
        self._groups = [_keep(codes, shape, group) for shape, group in by_shape.items()]

    @property
    def num_bytes(self) -> int:
        """Memory of all buffers."""
        return sum(group.key.num_bytes + group.value.num_bytes for group in self._groups)

    def store_again(
        self,
        slot_mapping: Mapping[str, torch.Tensor],
        source: torch.Tensor,
        place: torch.Tensor,
        is_moved: torch.Tensor,
    ) -> None:
        """Store accepted tokens where plain decoding would have them; codes have been cleared.

        Args:
            slot_mapping: For each layer the slots ``[T]`` of the batch.
            source: int64 ``[A]``; which tokens of the batch.
            place: int64 ``[A]``; the tokens of the batch whose slots they take.
            is_moved: bool ``[A]``; others are left alone.
        """
        slots: dict[int, torch.Tensor] = {}
        for group in self._groups:
            key_GAKP, value_GAKP = group.key.take(source), group.value.take(source)
            for layer, key_AKP, value_AKP in zip(group.layers, key_GAKP, value_GAKP, strict=True):
                slots_T = slot_mapping[layer.layer_name]
                # Layers of one cache group share the tensor.
                slots_A = slots.get(id(slots_T))
                if slots_A is None:
                    slots_A = slots_T[place].masked_fill_(~is_moved, -1)
                    slots[id(slots_T)] = slots_A
                layer.impl.store_padded(layer, key_AKP, value_AKP, slots_A)


def _keep(codes: CodeRows, shape: Shape, layers: Sequence[Any]) -> _Group:
    key, value = codes.new_keys(len(layers), shape), codes.new_rows(len(layers), shape)
    for layer, key_rows, value_rows in zip(layers, key.layers, value.layers, strict=True):
        layer.impl.tree_padding.key, layer.impl.tree_padding.value = key_rows, value_rows
    return _Group(layers, key, value)
