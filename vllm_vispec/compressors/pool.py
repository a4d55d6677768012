"""Pool: the mean of every `ratio` tokens (SpecVLM's Pool, along the sequence).

One dimension also serves images cut into tiles and those with row breaks. No parameters; T * D
additions.

Tensor names: as in `models.base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vllm_vispec.compressors.base import Compressor, borders_on
from vllm_vispec.compressors.spec import CompressorSpec


class Pool(Compressor):
    """[T, D] -> [max(1, T // ratio), D]."""

    name: ClassVar[str] = "pool"

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """See `Compressor.forward`."""
        rows_SD = torch.cat(list(images))
        sizes = [len(image) for image in images]
        length_A = torch.cat(
            [borders_on(rows_SD.device, size, self.num_tokens(size)).diff() for size in sizes]
        )
        owner_S = torch.repeat_interleave(
            torch.arange(len(length_A), device=rows_SD.device),
            length_A,
            output_size=len(rows_SD),
        )
        sum_AD = rows_SD.new_zeros(len(length_A), rows_SD.shape[1]).index_add(0, owner_S, rows_SD)
        return sum_AD / length_A[:, None]

    @classmethod
    def flops(cls, spec: CompressorSpec, hidden_size: int, size: int) -> int:
        """One addition per element."""
        return size * hidden_size
