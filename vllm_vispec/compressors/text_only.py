"""Text-only: the draft sees nothing of an image (SpecVLM's fifth branch). No parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from vllm_vispec.compressors.base import Compressor


class TextOnly(Compressor):
    """[T, D] -> [0, D]."""

    name: ClassVar[str] = "text_only"

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """See `Compressor.forward`."""
        return images[0][:0]
