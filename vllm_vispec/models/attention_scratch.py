"""Scratch of attention backends, made large enough for heads wider than the target's.

vLLM's Triton backend sizes the scratch of its split-K kernel by the model's head size, though the
kernel computes its addresses with the layer's: wider heads would be written behind the scratch,
into other tensors.  vLLM's V2 runner lets all FlashInfer layers share one workspace, which is sized
by the heads of the first.  Other backends take the head size of the layer's KV cache spec.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.utils.math_utils import next_power_of_2


def init_triton_builder(
    original: Callable[..., None], builder: Any, kv_cache_spec: Any, *args: Any, **kwargs: Any
) -> None:
    """Stands for ``TritonAttentionMetadataBuilder.__init__``: scratch for the layer's heads."""
    original(builder, kv_cache_spec, *args, **kwargs)
    scratch = builder.softmax_segm_output
    width = next_power_of_2(kv_cache_spec.head_size)
    if width > scratch.shape[-1]:
        builder.headdim = kv_cache_spec.head_size
        builder.softmax_segm_output = scratch.new_empty((*scratch.shape[:-1], width))


def set_workspace_buffer(
    original: Callable[..., None], builder: Any, workspace_buffer: torch.Tensor
) -> None:
    """Stands for FlashInfer's method; shares a workspace as large as vLLM would make it here."""
    from vllm.v1.attention.backends import flashinfer

    num_elements = builder.max_num_batched_tokens * builder.num_qo_heads * builder.head_dim
    least = num_elements * flashinfer.FLASHINFER_PREFILL_WORKSPACE_BYTES_PER_ELEM
    # A builder that is given none allocates its own.
    if workspace_buffer.numel() >= least:
        original(builder, workspace_buffer)
