"""An attention backend's implementation that pads heads on the way in and cuts them on the way out.

Shapes: T tokens, H heads, K key/value heads, h head size, P padded head size.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from vllm_vispec.models.padded_rows import PaddedRows
from vllm_vispec.trees.code_rows import CodeRows, Shape


@dataclass
class LayerPadding:
    """How one layer is padded, and the buffers that do it.

    Attributes:
        head_size: h.
        padded_size: P.
        key_shape: K, h and P.
        codes: What all buffers belong to.
        query, key, value, output: Buffers, shared by all layers of a shape.
    """

    head_size: int
    padded_size: int
    key_shape: Shape
    codes: CodeRows
    query: PaddedRows
    key: PaddedRows
    value: PaddedRows
    output: PaddedRows

    @classmethod
    def of(cls, layer: Any, head_size: int, padded_size: int, codes: CodeRows) -> "LayerPadding":
        """Return the padding of vLLM's `Attention` layer."""
        shape = layer.num_heads, head_size, padded_size
        key_shape = layer.num_kv_heads, head_size, padded_size
        return cls(
            head_size,
            padded_size,
            key_shape,
            codes,
            query=codes.query(shape),
            key=codes.key(key_shape),
            value=codes.plain("value", key_shape),
            output=codes.plain("output", shape),
        )


@lru_cache
def padded_class(base: Any) -> Any:
    """Return a subclass of a backend's implementation that pads; for instances that exist."""

    class PaddedImpl(base):
        tree_padding: LayerPadding

        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            output: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            """Attend with padded heads; keys and values have been stored before."""
            if attn_metadata is None:
                return output.zero_()
            padding = self.tree_padding
            padded_THP, own_THh = padding.output.views(output.shape[0])
            query_THP = padding.query.fill(query)
            super().forward(
                layer, query_THP, key, value, kv_cache, attn_metadata, padded_THP, *args, **kwargs
            )
            return output.copy_(own_THh)

        def do_kv_cache_update(
            self,
            layer: Any,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            slot_mapping: torch.Tensor,
        ) -> None:
            """Store keys with the tokens' codes."""
            padding = self.tree_padding
            super().do_kv_cache_update(
                layer, padding.key.fill(key), padding.value.fill(value), kv_cache, slot_mapping
            )

        def store_padded(
            self,
            layer: Any,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            slots: torch.Tensor,
        ) -> None:
            """Store ``[T, K, P]`` as they are at ``slots`` ``[T]`` of a cache; -1 skips."""
            super().do_kv_cache_update(layer, key, value, kv_cache, slots)

        # Compiled graphs ask these.  A fused operator would write scaled 8-bit values where
        # `forward` has a buffer of the model's dtype, or store keys whose heads nobody padded.

        def fused_output_quant_supported(self, quant_key: Any) -> bool:
            return False

        def fused_rope_kvcache_supported(self) -> bool:
            return False

        def fused_qk_norm_rope_kvcache_supported(self) -> bool:
            return False

        def fused_qk_norm_mrope_kvcache_supported(self) -> bool:
            return False

    return PaddedImpl
