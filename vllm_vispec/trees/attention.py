"""Attention layers whose heads are a few channels wider than their model knows.

A layer is built by vLLM with the padded head size, so that backend, kernel and KV cache have it.
Then it shows its own size to the model again, and its backend's implementation pads what comes in
and cuts what goes out.  That happens inside vLLM's opaque attention operators, so the model's
graph does not change.
"""

from collections.abc import Callable
from dataclasses import replace
from inspect import BoundArguments, signature
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType

from vllm_vispec.models.padded_heads import BackendFinder, PaddedHead, choose_padded_head, remedy
from vllm_vispec.models.padded_impl import LayerPadding, padded_class
from vllm_vispec.models.patch_points import apply_workspace
from vllm_vispec.trees.code_rows import CodeRows
from vllm_vispec.trees.codes import MIN_LOGIT, mask_logit
from vllm_vispec.trees.limits import check_cache_dtype
from vllm_vispec.trees.setting import has_branches, read_tree
from vllm_vispec.trees.settings import TreeSettings
from vllm_vispec.utils.errors import ViSpecError

_REFUSED = {
    "alibi_slopes": "ALiBi counts the tokens between query and key, not the levels",
    "logits_soft_cap": "a soft cap on logits lets hidden nodes through",
    "per_layer_sliding_window": "a sliding window counts the tokens between query and key",
}


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


def init_padded(original: Callable[..., None], layer: Any, *args: Any, **kwargs: Any) -> None:
    """Stands for ``Attention.__init__``; engines without trees get vLLM's own layers."""
    config = get_current_vllm_config()
    if not has_branches(config):
        original(layer, *args, **kwargs)
        return
    given = signature(original).bind(layer, *args, **kwargs)
    given.apply_defaults()
    if given.arguments["attn_type"] != AttentionType.DECODER:
        original(layer, *args, **kwargs)
        return
    known = _find_code_rows(config)
    codes = known or _make_code_rows(config)
    _build_padded(original, given, codes)
    if known is None:
        # A module of the target: when an engine sleeps, vLLM keeps buffers of its models alone.
        layer.tree_codes = codes


def _make_code_rows(config: Any) -> CodeRows:
    max_num_tokens = config.scheduler_config.max_num_batched_tokens
    # Models are built with the target's dtype and device as defaults.
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    return CodeRows(settings_of(config), max_num_tokens, dtype, device)


def _build_padded(original: Callable[..., None], given: BoundArguments, codes: CodeRows) -> None:
    """Build the layer that ``given`` begins with for wider heads, and hide that from its model."""
    values = given.arguments
    layer: Any = given.args[0]
    _check_layer(values)
    _check_class(type(layer))
    head_size = values["head_size"]
    head = padded_head(_finder_of(given), head_size, codes.num_channels)
    apply_workspace(head.backend)
    padded_size = head.size
    values.update(head_size=padded_size, attn_backend=head.backend)
    original(*given.args, **given.kwargs)
    _check_backend(layer)
    layer.head_size = layer.head_size_v = head_size
    backend_class: Any = type(layer.impl)
    layer.impl.__class__ = padded_class(backend_class)
    layer.impl.tree_padding = LayerPadding.of(layer, head_size, padded_size, codes)


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


def _check_class(layer_class: Any) -> None:
    """Refuse layers whose keys and values are not kept as `Attention` keeps them."""
    if layer_class.get_kv_cache_spec is not Attention.get_kv_cache_spec:
        raise ViSpecError(
            f"speculative config: tree does not work with this model, whose {layer_class.__name__} "
            'layers have a KV cache of their own kind; leave "tree" out'
        )


def _check_backend(layer: Any) -> None:
    name = layer.attn_backend.get_name()
    if layer.attn_backend.forward_includes_kv_cache_update:
        raise ViSpecError(
            f"speculative config: tree does not work with attention backend {name}, which stores "
            'keys while it attends; leave --attention-backend or "tree" out'
        )
    check_cache_dtype(layer.kv_cache_dtype)


def padded_head(finder: BackendFinder, head_size: int, num_channels: int) -> PaddedHead:
    """Return the head size and the backend that a layer with path codes is built with.

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


def padded_kv_cache_spec(original: Callable[..., Any], layer: Any, vllm_config: Any) -> Any:
    """Stands for ``Attention.get_kv_cache_spec``: the cache of a padded layer is as wide."""
    spec, padding = original(layer, vllm_config), padding_of(layer)
    if spec is None or padding is None:
        return spec
    return replace(spec, head_size=padding.padded_size, head_size_v=padding.padded_size)


def settings_of(vllm_config: Any) -> TreeSettings:
    """Return how the engine grows trees; for code that runs with trees alone."""
    settings = read_tree(vllm_config)
    assert settings is not None
    return settings
