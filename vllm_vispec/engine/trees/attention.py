"""Attention layers whose heads are a few channels wider than their model knows.

A layer is built by vLLM with the padded head size, so that backend, kernel and KV cache have it.
Then it shows its own size to the model again, and its backend's implementation pads what comes in
and cuts what goes out.  That happens inside vLLM's opaque attention operators, so the model's
graph does not change.

Shapes: T tokens, H heads, K key/value heads, h head size, P padded head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.selector import get_attn_backend

from vllm_vispec.engine.trees.code_rows import MAX_SPARE_CHANNELS, CodeRows
from vllm_vispec.engine.trees.kept import KeptLayer
from vllm_vispec.engine.trees.setting import read_tree
from vllm_vispec.engine.wrapping import wrap_once
from vllm_vispec.errors import ViSpecError
from vllm_vispec.tree.codes import MIN_LOGIT, mask_logit
from vllm_vispec.tree.settings import TreeSettings

_STEP = 8
_REFUSED = {
    "alibi_slopes": "ALiBi counts the tokens between query and key, not the levels",
    "logits_soft_cap": "a soft cap on logits lets hidden nodes through",
    "per_layer_sliding_window": "a sliding window counts the tokens between query and key",
}


def install() -> None:
    """Wrap vLLM's attention layer once; engines without trees get vLLM's own layers."""
    wrap_once(Attention, "__init__", _init)
    wrap_once(Attention, "get_kv_cache_spec", _get_kv_cache_spec)


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


def padding_of(layer: Any) -> LayerPadding | None:
    """Return how a layer is padded, None if it is not."""
    return getattr(getattr(layer, "impl", None), "tree_padding", None)


def code_rows(vllm_config: Any) -> CodeRows:
    """Return the buffers that the engine's layers read.

    Raises:
        ViSpecError: No layer is padded.
    """
    codes = _find_code_rows(vllm_config)
    if codes is None:
        raise ViSpecError(
            "speculative config: tree needs a target whose attention layers are vLLM's Attention, "
            'this one has none; leave "tree" out'
        )
    return codes


def _find_code_rows(vllm_config: Any) -> CodeRows | None:
    layers = vllm_config.compilation_config.static_forward_context.values()
    paddings = (padding_of(layer) for layer in layers)
    return next((padding.codes for padding in paddings if padding is not None), None)


def _append(rows_TXh: torch.Tensor, codes_T1E: torch.Tensor) -> torch.Tensor:
    return torch.cat((rows_TXh, codes_T1E.expand(-1, rows_TXh.shape[1], -1)), dim=-1)


def _init(original: Callable[..., None], layer: Any, *args: Any, **kwargs: Any) -> None:
    config = get_current_vllm_config()
    settings = read_tree(config)
    given = signature(original).bind(layer, *args, **kwargs)
    given.apply_defaults()
    values = given.arguments
    if settings is None or values["attn_type"] != AttentionType.DECODER:
        original(layer, *args, **kwargs)
        return
    _check_layer(values)
    head_size = values["head_size"]
    codes = _find_code_rows(config) or CodeRows(
        settings,
        config.scheduler_config.max_num_batched_tokens,
        torch.get_default_dtype(),
        torch.get_default_device(),
    )
    padded_size = _padded_head_size(head_size, codes.num_channels, values)
    values["head_size"] = padded_size
    original(*given.args, **given.kwargs)
    _check_backend(layer)
    layer.head_size = layer.head_size_v = head_size
    backend_class: Any = type(layer.impl)
    layer.impl.__class__ = _padded_class(backend_class)
    layer.impl.tree_padding = LayerPadding(head_size, padded_size, codes)


def _check_layer(values: dict[str, Any]) -> None:
    """Refuse layers that a tree cannot pass through."""
    found = [name for name in _REFUSED if values[name]]
    cache_config = values["cache_config"]
    if not found and cache_config is not None and cache_config.sliding_window:
        found = ["per_layer_sliding_window"]
    if found:
        raise ViSpecError(
            f"speculative config: tree does not work with this model, whose attention has "
            f'{found[0]} ({_REFUSED[found[0]]}); leave "tree" out'
        )
    if mask_logit(values["scale"]) < MIN_LOGIT:
        raise ViSpecError(
            f"speculative config: tree does not work with attention's scale of {values['scale']}, "
            'hidden nodes would show; leave "tree" out'
        )
    if values["head_size_v"] not in (None, values["head_size"]):
        raise ViSpecError(
            "speculative config: tree does not work with values of another head size than keys'; "
            'leave "tree" out'
        )


def _check_backend(layer: Any) -> None:
    name = layer.attn_backend.get_name()
    if layer.attn_backend.forward_includes_kv_cache_update:
        raise ViSpecError(
            f"speculative config: tree does not work with attention backend {name}, which stores "
            "keys while it attends; choose --attention-backend FLASH_ATTN or TRITON_ATTN"
        )
    if layer.kv_cache_dtype.startswith(("fp8", "nvfp4", "int8")):
        raise ViSpecError(
            f"kv_cache_dtype={layer.kv_cache_dtype} does not work with tree, whose codes are exact "
            "in 16 bits; leave one of them out"
        )


def smallest_head_size(head_size: int, num_channels: int, find: Callable[[int], Any]) -> int | None:
    """Return the smallest head size with room for the codes that a backend serves, None if none.

    Args:
        head_size: The model's.
        num_channels: Channels that the codes need.
        find: Returns vLLM's attention backend for a head size, None if there is none.
    """
    least = -(-(head_size + num_channels) // _STEP) * _STEP
    for size in range(least, head_size + num_channels + MAX_SPARE_CHANNELS, _STEP):
        backend = find(size)
        if backend is not None and backend.supports_head_size(size):
            return size
    return None


def find_backend(size: int, dtype: torch.dtype, cache_dtype: Any = "auto") -> Any:
    """Return the backend that vLLM chooses for a head size, None if it finds none."""
    try:
        return get_attn_backend(size, dtype, cache_dtype, attn_type=AttentionType.DECODER)
    except (ValueError, NotImplementedError):
        return None


def _padded_head_size(head_size: int, num_channels: int, values: dict[str, Any]) -> int:
    cache_config = values["cache_config"]
    cache_dtype = cache_config.cache_dtype if cache_config is not None else "auto"

    def find(size: int) -> Any:
        given = values["attn_backend"]
        return given or find_backend(size, torch.get_default_dtype(), cache_dtype)

    size = smallest_head_size(head_size, num_channels, find)
    if size is None:
        raise ViSpecError(
            f"speculative config: tree needs attention heads of {head_size} + {num_channels} "
            "channels or more, which no attention backend here serves; lower tree.depth, or choose "
            "--attention-backend TRITON_ATTN"
        )
    return size


def _get_kv_cache_spec(original: Callable[..., Any], layer: Any, vllm_config: Any) -> Any:
    spec, padding = original(layer, vllm_config), padding_of(layer)
    if spec is None or padding is None:
        return spec
    return replace(spec, head_size=padding.padded_size, head_size_v=padding.padded_size)


@lru_cache
def _padded_class(base: Any) -> Any:
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


def settings_of(vllm_config: Any) -> TreeSettings:
    """Return how the engine grows trees; for code that runs with trees alone."""
    settings = read_tree(vllm_config)
    assert settings is not None
    return settings
