"""Attention layers whose heads are wider than their model knows, for node codes or masks.

Each layer is built with a backend that subclasses the one it would get.  The subclass asks vLLM for
a KV cache of the padded head size, and its implementation is built for that size: it pads queries,
keys and values on the way in and cuts outputs on the way out.  Layer and model keep their own head
size, and since all this happens inside vLLM's opaque attention operators, the model's graph does
not change.

Shapes: T tokens, H heads, K key/value heads, h head size, P padded head size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from inspect import BoundArguments, signature
from typing import Any, NamedTuple

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType

from vllm_vispec.models.padded_heads import (
    BackendFinder,
    PaddedHead,
    choose_padded_head,
    padded_draft_head,
    remedy,
)
from vllm_vispec.models.patch_points import apply_workspace
from vllm_vispec.trees.codes import MIN_LOGIT, CodeBuffers, mask_logit
from vllm_vispec.trees.limits import check_cache_dtype, has_branches, settings_of
from vllm_vispec.trees.target_cache import TargetCache
from vllm_vispec.trees.verify import EngineTrees, TreeTable
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.logs import get_logger

logger = get_logger(__name__)

_REFUSED = {
    "alibi_slopes": "ALiBi counts the tokens between query and key, not the levels",
    "logits_soft_cap": "a soft cap on logits lets masked nodes through",
    "per_layer_sliding_window": "a sliding window counts the tokens between query and key",
}


class LayerPadding:
    """How one layer is padded, and the buffers that do it, shared by all layers of a shape.

    Args:
        layer: vLLM's `Attention` layer.
        padded_size: P.
        codes: What all buffers belong to.

    Attributes:
        head_size: h.
        key_shape: K, h and P.
    """

    def __init__(self, layer: Any, padded_size: int, codes: CodeBuffers) -> None:
        self.head_size, self.padded_size, self.codes = layer.head_size, padded_size, codes
        shape = layer.num_heads, layer.head_size, padded_size
        self.key_shape = layer.num_kv_heads, layer.head_size, padded_size
        self.query, self.key = codes.query_buffer(shape), codes.key_buffer(self.key_shape)
        self.value = codes.plain_buffer("value", self.key_shape)
        self.output = codes.plain_buffer("output", shape)


@lru_cache
def padded_impl(base: Any, padded_size: int) -> Any:
    """Return a subclass of a backend's implementation that is built for padded heads and pads."""

    class PaddedImpl(base):
        tree_padding: LayerPadding

        def __init__(self, num_heads: int, head_size: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(num_heads, padded_size, *args, **kwargs)

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

        def fused_output_quant_supported(self, *_: Any) -> bool:
            return False

        fused_rope_kvcache_supported = fused_output_quant_supported
        fused_qk_norm_rope_kvcache_supported = fused_output_quant_supported
        fused_qk_norm_mrope_kvcache_supported = fused_output_quant_supported

    return PaddedImpl


@lru_cache
def padded_backend(base: Any, padded_size: int) -> Any:
    """Return a subclass of an attention backend whose heads and KV cache are padded."""

    def get_impl_cls() -> Any:
        return padded_impl(base.get_impl_cls(), padded_size)

    def customize_spec(cls: Any, spec: Any) -> Any:
        return base.customize_spec(replace(spec, head_size=padded_size, head_size_v=padded_size))

    members = {
        "get_impl_cls": staticmethod(get_impl_cls),
        "customize_spec": classmethod(customize_spec),
    }
    # vLLM groups layers by the name of their backend, so each subclass needs a name of its own.
    return type(f"{base.__name__}Padded{padded_size}", (base,), members)


# Buffers of the model that is being built, where they are its own.
_OWN: ContextVar[CodeBuffers | None] = ContextVar("_OWN", default=None)


@contextmanager
def layers_with(codes: CodeBuffers | None) -> Iterator[None]:
    """Build layers with these buffers; None: with those that the engine's layers share, if any."""
    token = _OWN.set(codes)
    try:
        yield
    finally:
        _OWN.reset(token)


def init_padded(original: Callable[..., None], layer: Any, *args: Any, **kwargs: Any) -> None:
    """Stands for ``Attention.__init__``; vLLM's own layers where nothing needs wider heads."""
    config, own = get_current_vllm_config(), _OWN.get()
    given = signature(original).bind(layer, *args, **kwargs)
    given.apply_defaults()
    values, is_padded = given.arguments, own is not None or has_branches(config)
    if not is_padded or values["attn_type"] != AttentionType.DECODER:
        original(layer, *args, **kwargs)
        return
    known = own or _find_code_buffers(config)
    codes = known or _make_code_buffers(config)
    _check_layer(type(layer), values, codes.setting)
    finder = _finder_of(given)
    head = PaddedHead(values["head_size"], None)
    if codes.has_masks:
        head = padded_draft_head(finder, head.size)
    if codes.num_channels:
        head = padded_head(finder, head.size, codes.num_channels)
    apply_workspace(head.backend)
    values["attn_backend"] = padded_backend(head.backend, head.size)
    original(*given.args, **given.kwargs)
    _check_backend(layer, codes.setting)
    layer.impl.tree_padding = LayerPadding(layer, head.size, codes)
    if known is None:
        # A module of the target: when an engine sleeps, vLLM keeps buffers of its models alone.
        layer.tree_codes = codes


def _make_code_buffers(config: Any) -> CodeBuffers:
    settings = settings_of(config)
    return CodeBuffers(
        settings.levels,
        settings.top_k,
        config.scheduler_config.max_num_batched_tokens,
        # Models are built with the target's dtype and device as defaults.
        torch.get_default_dtype(),
        torch.get_default_device(),
    )


def code_buffers(vllm_config: Any) -> CodeBuffers:
    """Return the buffers that the engine's layers read.

    Raises:
        ViSpecError: No layer is padded.
    """
    codes = _find_code_buffers(vllm_config)
    if codes is None:
        raise ViSpecError(
            "speculative config: tree needs a target whose attention layers are vLLM's Attention, "
            'this one has none; leave "tree" out'
        )
    return codes


def draft_code_buffers(vllm_config: Any) -> CodeBuffers:
    """Return the buffers that the draft's layers read: they are built last."""
    return padded_layers(vllm_config)[-1].impl.tree_padding.codes


def padded_head(finder: BackendFinder, head_size: int, num_channels: int) -> PaddedHead:
    """Return the head size and the backend that a layer with codes is built with.

    Args:
        head_size: The model's.
        num_channels: Channels that the codes need.

    Raises:
        ViSpecError: If no backend serves a head size that large.
    """
    least = head_size + num_channels
    head = choose_padded_head(finder, head_size, least)
    if head is None:
        what_to_set = remedy(finder, head_size, least, "--attention-backend {}")
        raise ViSpecError(
            f"speculative config: tree needs attention heads of {head_size} + {num_channels} "
            f"channels or more, which no attention backend here serves; lower tree.depth, or "
            f"{what_to_set}"
        )
    return head


def _finder_of(given: BoundArguments) -> BackendFinder:
    """Return what finds the backend of the layer that ``given`` would build."""
    backend = given.arguments["attn_backend"]
    if backend is not None:
        return BackendFinder(torch.get_default_dtype(), "auto", {}, given=backend)
    return BackendFinder.of_layer(*given.args[1:], **given.kwargs)


def _check_layer(layer_class: Any, values: dict[str, Any], setting: str = "tree") -> None:
    """Refuse layers that codes or masks cannot pass, by arguments of ``Attention.__init__``."""
    found = [f"{name} ({reason})" for name, reason in _REFUSED.items() if values[name]]
    cache_config, problem = values["cache_config"], ""
    if not found and cache_config is not None and cache_config.sliding_window:
        name = "per_layer_sliding_window"
        found = [f"{name} ({_REFUSED[name]})"]
    if found:
        problem = f"this model, whose attention has {found[0]}"
    elif mask_logit(values["scale"]) < MIN_LOGIT:
        problem = f"attention's scale of {values['scale']}, masked nodes would show"
    elif values["head_size_v"] not in (None, values["head_size"]):
        problem = "values of another head size than keys'"
    elif layer_class.get_kv_cache_spec is not Attention.get_kv_cache_spec:
        name = layer_class.__name__
        problem = f"this model, whose {name} layers have a KV cache of their own kind"
    if problem:
        raise ViSpecError(
            f'speculative config: {setting} does not work with {problem}; leave "{setting}" out'
        )


def _check_backend(layer: Any, setting: str = "tree") -> None:
    name = layer.attn_backend.get_name()
    if layer.attn_backend.forward_includes_kv_cache_update:
        raise ViSpecError(
            f"speculative config: {setting} does not work with attention backend {name}, which "
            f'stores keys while it attends; leave --attention-backend or "{setting}" out'
        )
    check_cache_dtype(layer.kv_cache_dtype, setting)


class TreeMemory(NamedTuple):
    """What padding adds to the KV cache, in percent, and bytes of the padded buffers."""

    kv_percent: float
    num_bytes: int


def tree_memory(vllm_config: Any) -> TreeMemory | None:
    """Measure an engine whose target and draft are loaded; None if nothing is padded."""
    shapes = [layer.impl.tree_padding.key_shape for layer in padded_layers(vllm_config)]
    if not shapes:
        return None
    own = sum(num_heads * head_size for num_heads, head_size, _ in shapes)
    padded = sum(num_heads * padded_size for num_heads, _, padded_size in shapes)
    return TreeMemory(100 * (padded / own - 1), code_buffers(vllm_config).num_bytes)


def padded_layers(vllm_config: Any) -> list[Any]:
    """Return padded layers, without those that share another layer's cache."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    return [
        layer
        for layer in layers
        if _is_padded(layer) and layer.kv_sharing_target_layer_name is None
    ]


def target_layers(vllm_config: Any) -> list[Any]:
    """Return the target's padded layers, once its draft is loaded.

    Raises:
        ViSpecError: Some layer's keys pass by its backend.
    """
    layers = [
        layer for layer in padded_layers(vllm_config) if not getattr(layer, "is_draft_layer", False)
    ]
    # vLLM 0.33 has such models.
    if any(getattr(layer, "kv_cache_update_bypass", False) for layer in layers):
        raise ViSpecError(
            "speculative config: tree does not work with this model, which stores keys by an "
            'operator of its own; leave "tree" out'
        )
    return layers


def make_engine_trees(
    vllm_config: Any, layers: Sequence[Any], max_num_requests: int, device: torch.device
) -> EngineTrees:
    """Return an engine's trees, and say what they take in memory.

    Args:
        vllm_config: vLLM's, whose target and draft are loaded.
        layers: The target's padded layers.
        max_num_requests: Most requests at once.
        device: Where trees lie.
    """
    num_nodes = vllm_config.speculative_config.num_speculative_tokens
    table = TreeTable(settings_of(vllm_config).levels, num_nodes, max_num_requests, device)
    memory = tree_memory(vllm_config)
    assert memory is not None
    sizes = {layer.impl.tree_padding.key_shape[1:] for layer in padded_layers(vllm_config)}
    logger.info(
        "ViSpec trees: attention heads are padded (%s channels), which adds %.1f %% to the KV "
        "cache; buffers for padded rows take %.1f MiB",
        ", ".join(f"{head} to {wide}" for head, wide in sorted(sizes)),
        memory.kv_percent,
        memory.num_bytes / 2**20,
    )
    return EngineTrees(code_buffers(vllm_config), table, TargetCache(layers))


def _find_code_buffers(vllm_config: Any) -> CodeBuffers | None:
    layers = vllm_config.compilation_config.static_forward_context.values()
    return next((layer.impl.tree_padding.codes for layer in layers if _is_padded(layer)), None)


def _is_padded(layer: Any) -> bool:
    return hasattr(getattr(layer, "impl", None), "tree_padding")
