"""An attention backend's implementation that pads heads on the way in and cuts them on the way out.

Shapes: T tokens, H heads, K key/value heads, h head size, P padded head size.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from vllm_vispec.engine.trees.code_rows import CodeRows
from vllm_vispec.engine.trees.kept import KeptLayer


@dataclass
class LayerPadding:
    """How one layer is padded.

    Attributes:
        head_size: h.
        padded_size: P.
        codes: What the channels of the batch's tokens hold.
        kept: Keys and values of the batch, for the layers of the target.
    """

    head_size: int
    padded_size: int
    codes: CodeRows
    kept: KeptLayer | None = None

    @property
    def extra(self) -> int:
        """Channels added."""
        return self.padded_size - self.head_size

    def query(self, query_THh: torch.Tensor) -> torch.Tensor:
        """Return ``[T, H, P]`` with the tokens' codes."""
        return _append(query_THh, self.codes.query(query_THh.shape[0], self.extra))

    def key(self, key_TKh: torch.Tensor) -> torch.Tensor:
        """Return ``[T, K, P]`` with the tokens' codes."""
        return _append(key_TKh, self.codes.key(key_TKh.shape[0], self.extra))

    def plain(self, rows_TKh: torch.Tensor) -> torch.Tensor:
        """Return ``[T, K, P]`` with zeros, as values and tokens outside trees have them."""
        return F.pad(rows_TKh, (0, self.extra))


def _append(rows_TXh: torch.Tensor, codes_T1E: torch.Tensor) -> torch.Tensor:
    return torch.cat((rows_TXh, codes_T1E.expand(-1, rows_TXh.shape[1], -1)), dim=-1)


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
            padded_THP = output.new_empty((*output.shape[:-1], padding.padded_size))
            super().forward(
                layer,
                padding.query(query),
                key,
                value,
                kv_cache,
                attn_metadata,
                padded_THP,
                *args,
                **kwargs,
            )
            return output.copy_(padded_THP[..., : padding.head_size])

        def do_kv_cache_update(
            self,
            layer: Any,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            slot_mapping: torch.Tensor,
        ) -> None:
            """Store keys with the tokens' codes, and remember what may be stored again."""
            padding = self.tree_padding
            if padding.kept is not None:
                padding.kept.keep(key, value)
            super().do_kv_cache_update(
                layer, padding.key(key), padding.plain(value), kv_cache, slot_mapping
            )

        def store_plain(
            self, layer: Any, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
        ) -> None:
            """Store ``[T, K, h]`` without codes at ``slots`` ``[T]``; -1 skips."""
            padding = self.tree_padding
            super().do_kv_cache_update(
                layer, padding.plain(key), padding.plain(value), layer.kv_cache, slots
            )

    return PaddedImpl
