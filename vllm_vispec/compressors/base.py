"""What every compressor is: `N_v x h` embeddings of an image -> `M x h` tokens for the draft.

Tensor names end in their shape: T embeddings of one image, M tokens made of it, D hidden, S the
embeddings of all images one after another, A the tokens of all images one after another.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from vllm_vispec.compressors.places import num_tokens
from vllm_vispec.compressors.spec import CompressorSpec


class Compressor(nn.Module):
    """Base of the primitives. Every image is compressed by itself, all of them in one call.

    Args:
        spec: name and amount.
        hidden_size: D.
        num_heads: attention heads, for those that attend.
        bias: whether projections have one, as the head's q/k/v.
    """

    name: ClassVar[str]

    def __init__(self, spec: CompressorSpec, hidden_size: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        self.spec, self.hidden_size = spec, hidden_size

    @abstractmethod
    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Compress images, each [T, D] with its own T of at least 1.

        Returns:
            [A, D]: the tokens of the first image, then those of the second, and so on; as many of
            each as `num_tokens` says.
        """

    @classmethod
    def tensor_shapes(
        cls, spec: CompressorSpec, hidden_size: int, num_heads: int, bias: bool
    ) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of the parameters; none unless a subclass says so."""
        return {}

    @classmethod
    def flops(cls, spec: CompressorSpec, hidden_size: int, size: int) -> int:
        """Floating point operations for an image of `size` embeddings; none for copying."""
        return 0

    def num_tokens(self, size: int) -> int:
        """M for an image of `size` embeddings."""
        return num_tokens(self.spec, size)

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """Set the weights of a fresh compressor; nothing to do without any."""
        return

    def gather(self, images: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Pick embeddings of every image by their places [M, ...] in it: [A, ..., D].

        Places lie on the images' device, so that nothing has to be copied there.
        A place of -1 is a row of zeros.
        """
        first = images[0]
        rows_SD = torch.cat((*images, first.new_zeros(1, first.shape[1])))
        starts, last = [0], len(rows_SD) - 1
        for image in images:
            starts.append(starts[-1] + len(image))
        index = torch.cat(
            [
                torch.where(place < 0, last, place + start)
                for place, start in zip(places, starts, strict=False)
            ]
        )
        return rows_SD[index]


def borders_on(device: torch.device, size: int, count: int) -> Tensor:
    """`places.segments` computed on a device, int64 [count + 1]: nothing is copied there."""
    return torch.arange(count + 1, device=device) * size // max(count, 1)


def middles_on(device: torch.device, size: int, count: int) -> Tensor:
    """`places.middles` computed on a device, int64 [count]."""
    borders = borders_on(device, size, count)
    return (borders[:-1] + borders[1:] - 1) // 2
