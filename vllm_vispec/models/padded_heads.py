"""Attention heads with more channels than the model's: their size, backend and scratch.

The smallest size wins whose backend is the one that vLLM chooses for the model's own size, so that
an engine keeps to one backend where it can. Otherwise the smallest size wins that any backend
serves. vLLM's selector is asked exactly as the layer would ask it, and a backend counts only if its
implementation can be built: some refuse a device or a cache dtype no earlier.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import unwrap
from math import ceil
from typing import Any

import torch
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention import attention as attention_module
from vllm.platforms import current_platform
from vllm.utils.math_utils import next_power_of_2
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import KVQuantMode, get_kv_quant_mode

from vllm_vispec.compat.patching import patched
from vllm_vispec.spec_decode.row_table import MASK_CHANNEL
from vllm_vispec.trees.limits import num_code_channels
from vllm_vispec.utils.errors import ViSpecError

# Below exp(-104) float32 has nothing left; the margin covers real logits of several hundred.
MIN_MASK_LOGIT = 1000.0
# FlashInfer goes from 256 to 512 at once.
MAX_EXTRA_CHANNELS = 256


@dataclass(frozen=True)
class PaddedHead:
    """A head size, and the backend that serves it."""

    size: int
    backend: Any


@dataclass(frozen=True)
class BackendFinder:
    """What a layer asks vLLM's selector for, all but the head size.

    Attributes:
        dtype: Of queries.
        kv_cache_dtype: vLLM's name for the dtype of cached keys and values.
        options: The selector's other arguments.
        given: The backend that the layer's model names; then the selector is not asked.
    """

    dtype: torch.dtype
    kv_cache_dtype: str
    options: dict[str, Any]
    given: Any = None

    @classmethod
    def of_layer(cls, *args: Any, **kwargs: Any) -> "BackendFinder":
        """Return the finder for a layer.

        Args:
            args, kwargs: As `Attention.__init__` takes them, ``attn_backend`` left out.
        """
        with patched(attention_module, "get_attn_backend", _stop):
            try:
                # Without our own wrapper, and no further than to the question.
                unwrap(Attention.__init__)(Attention.__new__(Attention), *args, **kwargs)
            except _SelectorCalled as call:
                return cls(call.dtype, call.kv_cache_dtype, call.options)
        raise AssertionError("vLLM's attention layer did not ask for a backend")

    @property
    def is_quantized(self) -> bool:
        """Whether the cache holds fewer than 16 bits a number."""
        return get_kv_quant_mode(self.kv_cache_dtype) != KVQuantMode.NONE

    @property
    def step(self) -> int:
        """What head sizes are multiples of: keys and values begin at addresses kernels can load."""
        if not self.is_quantized:
            return 8
        return 32 if current_platform.is_cpu() else 16

    def find(self, head_size: int) -> Any:
        """Return the backend that serves a head size, None if there is none."""
        backend = self.given or self._selected(head_size)
        if backend is None or not backend.supports_head_size(head_size):
            return None
        return backend if self._can_be_built(backend, head_size) else None

    def _selected(self, head_size: int) -> Any:
        try:
            return get_attn_backend(head_size, self.dtype, self.kv_cache_dtype, **self.options)
        except (ValueError, NotImplementedError):
            return None

    def _can_be_built(self, backend: Any, head_size: int) -> bool:
        config = get_current_vllm_config_or_none()
        if config is None or config.model_config is None:
            # Implementations read the model's dtype; `vispec doctor` has no model.
            return True
        try:
            backend.get_impl_cls()(
                num_heads=1,
                head_size=head_size,
                scale=1.0,
                num_kv_heads=1,
                alibi_slopes=None,
                sliding_window=None,
                kv_cache_dtype=self.kv_cache_dtype,
            )
        except (ValueError, NotImplementedError):
            return False
        return True


def choose_padded_head(finder: BackendFinder, head_size: int, least: int) -> PaddedHead | None:
    """Return what a layer is built with, None if no backend serves a size that large.

    Args:
        finder: Finds the layer's backends.
        head_size: The model's.
        least: The smallest size that has all channels needed.
    """
    step = finder.step
    sizes = range(-(-least // step) * step, least + MAX_EXTRA_CHANNELS + 1, step)
    own = finder.find(head_size)
    if own is not None:
        for size in sizes:
            if own.supports_head_size(size) and finder.find(size) is own:
                return PaddedHead(size, own)
    found = (PaddedHead(size, finder.find(size)) for size in sizes)
    return next((head for head in found if head.backend is not None), None)


def remedy(finder: BackendFinder, head_size: int, least: int, setting: str) -> str:
    """Return what to set instead, once no backend serves a layer; it was tried.

    Args:
        setting: How a backend is stated for the layer, its name as ``{}``.
    """
    with _no_backend_stated():
        head = choose_padded_head(replace(finder, given=None), head_size, least)
        if head is not None:
            return "set " + setting.format(head.backend.get_name())
        plain = replace(finder, given=None, kv_cache_dtype="auto")
        if finder.is_quantized and choose_padded_head(plain, head_size, least) is not None:
            return "leave kv_cache_dtype out"
    return "leave the speculative config out"


def mask_logit(head_dim: int, num_channels: int) -> float:
    """Return how far a masked position's logit lies below the others'."""
    return float(num_channels * MASK_CHANNEL**2 * head_dim**-0.5)


def least_head_size(head_dim: int, num_branches: int = 0) -> int:
    """Return the smallest head size that has channels enough to mask.

    Args:
        num_branches: Channels that are needed beside those that mask.
    """
    return head_dim + num_branches + ceil(MIN_MASK_LOGIT / mask_logit(head_dim, 1))


def padded_draft_head(finder: BackendFinder, head_dim: int, num_branches: int = 0) -> PaddedHead:
    """Return the head size ``P`` of a draft's layer, and the backend that the layer is built with.

    In engines with trees the layer is padded once more, for the node codes; the backend is the one
    that serves both.

    Raises:
        ViSpecError: If no backend serves a head size that large.
    """
    least = least_head_size(head_dim, num_branches)
    num_codes = num_code_channels(get_current_vllm_config())
    if num_codes:
        least = -(-least // finder.step) * finder.step
    head = choose_padded_head(finder, head_dim, least + num_codes)
    if head is None:
        what_to_set = remedy(
            finder,
            head_dim,
            least + num_codes,
            '"attention_backend": "{}" in the speculative config',
        )
        raise ViSpecError(
            f"no attention backend here serves heads of {least + num_codes} channels with "
            f"kv_cache_dtype={finder.kv_cache_dtype}; ViSpec needs them above the draft's "
            f"{head_dim} to mask image rows{_and_branches(num_branches)}; {what_to_set}"
        )
    return PaddedHead(least, head.backend) if num_codes else head


def _and_branches(num_branches: int) -> str:
    return f" and to weigh the compressor's {num_branches} branches" if num_branches else ""


def init_triton_builder(
    original: Callable[..., None], builder: Any, kv_cache_spec: Any, *args: Any, **kwargs: Any
) -> None:
    """Stands for ``TritonAttentionMetadataBuilder.__init__``: scratch for the layer's heads.

    vLLM sizes the scratch of its split-K kernel by the model's head size, though the kernel
    computes its addresses with the layer's. Wider heads would be written behind the scratch, into
    other tensors.
    """
    original(builder, kv_cache_spec, *args, **kwargs)
    scratch = builder.softmax_segm_output
    width = next_power_of_2(kv_cache_spec.head_size)
    if width > scratch.shape[-1]:
        builder.headdim = kv_cache_spec.head_size
        builder.softmax_segm_output = scratch.new_empty((*scratch.shape[:-1], width))


def set_workspace_buffer(
    original: Callable[..., None], builder: Any, workspace_buffer: torch.Tensor
) -> None:
    """Stands for FlashInfer's method; shares a workspace as large as vLLM would make it here.

    The V2 model runner lets all FlashInfer layers share one, sized by the heads of the first.
    """
    from vllm.v1.attention.backends import flashinfer

    num_elements = builder.max_num_batched_tokens * builder.num_qo_heads * builder.head_dim
    least = num_elements * flashinfer.FLASHINFER_PREFILL_WORKSPACE_BYTES_PER_ELEM
    # A builder that is given none allocates its own.
    if workspace_buffer.numel() >= least:
        original(builder, workspace_buffer)


class _SelectorCalled(Exception):
    """Ends the building of a layer; carries the arguments of its call of vLLM's selector."""

    def __init__(self, dtype: torch.dtype, kv_cache_dtype: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.dtype, self.kv_cache_dtype, self.options = dtype, kv_cache_dtype, options


def _stop(
    _original: Any, _head_size: int, dtype: torch.dtype, kv_cache_dtype: str, **options: Any
) -> None:
    raise _SelectorCalled(dtype, kv_cache_dtype, options)


@contextmanager
def _no_backend_stated() -> Iterator[None]:
    """While active, vLLM's selector chooses among all backends, whatever the user stated."""
    config = get_current_vllm_config().attention_config
    stated, config.backend = config.backend, None
    try:
        yield
    finally:
        config.backend = stated
