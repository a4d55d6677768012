"""Prune: one token of every `ratio` stays as it is (SpecVLM's Prune, made deterministic).

The paper drops tokens at random; the middle one of every stretch is reproducible and as evenly
spread. No parameters, no arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vllm_vispec.models.base import Compressor
from vllm_vispec.models.places import middles


class Prune(Compressor):
    """[T, D] -> [max(1, T // ratio), D]."""

    name: ClassVar[str] = "prune"

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """See `Compressor.forward`."""
        sizes = [len(image) for image in images]
        return self.gather(
            images, [torch.from_numpy(middles(size, self.num_tokens(size))) for size in sizes]
        )
