"""Prune: one token of every `ratio` stays as it is (SpecVLM's Prune, made deterministic).

The paper drops tokens at random; the middle one of every stretch is reproducible and as evenly
spread. No parameters, no arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from vllm_vispec.compressors.base import Compressor, middles_on


class Prune(Compressor):
    """[T, D] -> [max(1, T // ratio), D]."""

    name: ClassVar[str] = "prune"

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """See `Compressor.forward`."""
        sizes = [len(image) for image in images]
        device = images[0].device
        return self.gather(
            images, [middles_on(device, size, self.num_tokens(size)) for size in sizes]
        )
