"""Keys and values of the batch, kept until the accepted paths are known.

A node's key carries its code and lies in the node's slot.  Once a path is accepted its keys and
values are stored again, without codes, in consecutive slots, by the backend's own operator: the
cache then is what plain decoding would have left.  References to a layer's tensors would not do,
compiled graphs use their memory again for the next layer.

Shapes: T tokens of a batch, A places of accepted paths, K key/value heads, h head size.
"""

from collections.abc import Mapping
from typing import Any

import torch


class KeptKeys:
    """What all layers of the target stored in the current pass.

    Args:
        always: Keep every pass, as recorded graphs need it; else only those over trees.
    """

    def __init__(self, *, always: bool) -> None:
        self._always = always
        self._wanted = False
        self._layers: dict[str, KeptLayer] = {}

    @property
    def active(self) -> bool:
        """Whether the current pass is kept."""
        return self._always or self._wanted

    def want(self, wanted: bool) -> None:
        """Say whether the next pass has trees."""
        self._wanted = wanted

    def add(self, layer: Any, max_num_tokens: int) -> "KeptLayer":
        """Allocate for one layer; vLLM's `Attention`, whose implementation pads."""
        kept = KeptLayer(self, layer, max_num_tokens)
        self._layers[layer.layer_name] = kept
        return kept

    @property
    def num_bytes(self) -> int:
        """Memory of all buffers."""
        return sum(kept.key.nbytes + kept.value.nbytes for kept in self._layers.values())

    def store_again(
        self,
        slot_mapping: Mapping[str, torch.Tensor],
        source: torch.Tensor,
        place: torch.Tensor,
        is_moved: torch.Tensor,
    ) -> None:
        """Store accepted tokens without their codes where plain decoding would have them.

        Args:
            slot_mapping: For each layer the slots ``[T]`` of the batch.
            source: int64 ``[A]``; which tokens of the batch.
            place: int64 ``[A]``; the tokens of the batch whose slots they take.
            is_moved: bool ``[A]``; others are left alone.
        """
        slots: dict[int, torch.Tensor] = {}
        for name, kept in self._layers.items():
            slots_T = slot_mapping[name]
            # Layers of one cache group share the tensor.
            if id(slots_T) not in slots:
                slots[id(slots_T)] = slots_T[place].masked_fill_(~is_moved, -1)
            kept.store_again(source, slots[id(slots_T)])


class KeptLayer:
    """One layer's part of `KeptKeys`."""

    def __init__(self, owner: KeptKeys, layer: Any, max_num_tokens: int) -> None:
        self._owner, self._layer = owner, layer
        shape = (max_num_tokens, layer.num_kv_heads, layer.head_size)
        options = {"dtype": layer.dtype, "device": layer._k_scale.device}
        self.key = torch.zeros(shape, **options)
        self.value = torch.zeros(shape, **options)

    def keep(self, key_TKh: torch.Tensor, value_TKh: torch.Tensor) -> None:
        """Copy what the layer stores."""
        if self._owner.active:
            num_tokens = key_TKh.shape[0]
            self.key[:num_tokens].copy_(key_TKh)
            self.value[:num_tokens].copy_(value_TKh)

    def store_again(self, source_A: torch.Tensor, slots_A: torch.Tensor) -> None:
        """Store tokens of the batch at other slots, without codes."""
        self._layer.impl.store_plain(self._layer, self.key[source_A], self.value[source_A], slots_A)
