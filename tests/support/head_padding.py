"""Test-only shims that let a CPU engine serve the golden targets.

Their head size (16) is below the smallest that vLLM's CPU attention supports (32). Zero-padding
queries, keys and values with an unchanged scale leaves the result untouched, so the shim widens
such layers and slices their output. Layers with a supported head size, the draft's among them,
run vLLM's own code unchanged.
"""

from __future__ import annotations

import functools
from typing import Any

SMALLEST_HEAD = 32


def install() -> None:
    """Patch vLLM in this process (idempotent)."""
    from vllm.model_executor.layers.attention import Attention

    if getattr(Attention, "_vispec_test_padding", False):
        return
    Attention._vispec_test_padding = True
    Attention.__init__ = _padded_init(Attention.__init__)
    Attention.forward = _padded_forward(Attention.forward)
    allow_unequal_llava_next_embeds()


def _padded_init(original: Any) -> Any:
    @functools.wraps(original)
    def init(self: Any, num_heads: int, head_size: int, *args: Any, **kwargs: Any) -> None:
        original(self, num_heads, max(head_size, SMALLEST_HEAD), *args, **kwargs)
        self.unpadded_head_size = head_size

    return init


def _padded_forward(original: Any) -> Any:
    @functools.wraps(original)
    def forward(self: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        size = self.unpadded_head_size
        if size == self.head_size:
            return original(self, query, key, value, *args, **kwargs)
        padded = [_pad(part, size, self.head_size) for part in (query, key, value)]
        output = original(self, *padded)
        rows = output.view(len(output), -1, self.head_size)[..., :size]
        return rows.reshape(len(output), -1)

    return forward


def _pad(part: Any, size: int, padded: int) -> Any:
    """Zero-pad [tokens, heads * size] to [tokens, heads * padded]."""
    import torch

    heads = part.reshape(len(part), -1, size)
    return torch.nn.functional.pad(heads, (0, padded - size)).reshape(len(part), -1)


def allow_unequal_llava_next_embeds() -> None:
    """Let one encoder batch hold ``image_embeds`` of different lengths (pixel values may)."""
    from typing import Annotated

    import torch
    from vllm.model_executor.models.llava_next import LlavaNextImageEmbeddingInputs
    from vllm.utils.tensor_schema import TensorShape

    shape = TensorShape("bn", "ifs", "hs", dynamic_dims={"ifs"})
    LlavaNextImageEmbeddingInputs.__annotations__["data"] = Annotated[
        torch.Tensor | list[torch.Tensor], shape
    ]
