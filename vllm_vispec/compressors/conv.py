"""Conv: a convolution along the sequence, kernel and stride `ratio` (SpecVLM's Conv).

ratio * D * D + D parameters, which is why high ratios are impractical; 2 * ratio * D * D operations
per token. An image shorter than the kernel is filled up with zeros.

Tensor names: as in `models.base`; R ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vllm_vispec.compressors.base import Compressor, borders_on
from vllm_vispec.compressors.places import num_tokens
from vllm_vispec.compressors.spec import CompressorSpec

# What disturbs the mean that a fresh kernel computes, as a share of a normal start.
START_NOISE = 0.1


class Conv(Compressor):
    """[T, D] -> [max(1, T // ratio), D]."""

    name: ClassVar[str] = "conv"

    def __init__(self, spec: CompressorSpec, hidden_size: int, num_heads: int, bias: bool) -> None:
        super().__init__(spec, hidden_size, num_heads, bias)
        self.kernel = nn.Linear(spec.amount * hidden_size, hidden_size)

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """See `Compressor.forward`."""
        device = images[0].device
        windows = [self._windows(len(image), device) for image in images]
        window_ARD = self.gather(images, windows)
        return self.kernel(window_ARD.flatten(1))

    def _windows(self, size: int, device: torch.device) -> Tensor:
        """Embeddings under the kernel for every token, int64 [M, R]; -1 behind the image's end."""
        starts = borders_on(device, size, self.num_tokens(size))[:-1]
        window_MR = starts[:, None] + torch.arange(self.spec.amount, device=device)
        return torch.where(window_MR < size, window_MR, -1)

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """Begin as the mean of the window, disturbed a little."""
        ratio, size = self.spec.amount, self.hidden_size
        std = START_NOISE * self.kernel.in_features**-0.5
        nn.init.normal_(self.kernel.weight, std=std, generator=generator)
        self.kernel.weight.add_(torch.eye(size).repeat(1, ratio) / ratio)
        nn.init.zeros_(self.kernel.bias)

    @classmethod
    def tensor_shapes(
        cls, spec: CompressorSpec, hidden_size: int, num_heads: int, bias: bool
    ) -> Mapping[str, tuple[int, ...]]:
        """Kernel and bias."""
        wide = spec.amount * hidden_size
        return {"kernel.weight": (hidden_size, wide), "kernel.bias": (hidden_size,)}

    @classmethod
    def flops(cls, spec: CompressorSpec, hidden_size: int, size: int) -> int:
        """A product per token."""
        return 2 * num_tokens(spec, size) * spec.amount * hidden_size**2
