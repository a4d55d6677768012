"""What makes an image's tokens for the draft: `T x D` embeddings in, `M x D` tokens out.

There are six primitives. `ImageCompressor` combines them, with or without a gate. Every image is
compressed by itself; all images of a call go through together.

Tensor names end in their shape: T embeddings of one image, M tokens made of it, D hidden, S the
embeddings of all images one after another, A the tokens of all images one after another, R images,
W a kernel's width, Q queries, H heads, K head size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_vispec.compressors.gate import DECISIONS, Gate, GateOutput
from vllm_vispec.compressors.places import borders, middles, num_tokens
from vllm_vispec.compressors.spec import CompressorSpec

# What disturbs the mean that a new kernel computes, as a share of a normal initial weight.
CONV_NOISE = 0.1


class Compressor(nn.Module):
    """Base of the primitives.

    Args:
        spec: Name and amount.
        hidden_size: D.
        num_heads: Attention heads, for primitives that attend.
        bias: Whether projections have one, as the head's q/k/v.
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

    def init_weights(self, generator: torch.Generator) -> None:
        """Set the weights of a new compressor; nothing to do without any."""

    def borders(self, image_TD: Tensor) -> Tensor:
        """`places.borders` of an image, int64 [M + 1], computed on its device without a copy."""
        size = len(image_TD)
        index = torch.arange(num_tokens(self.spec, size) + 1, device=image_TD.device)
        return borders(index, size)

    def gather(self, images: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        """Pick embeddings of every image by their places [M, ...] in it: [A, ..., D].

        Places lie on the images' device, so that nothing is copied there. A place of -1 is a row
        of zeros.
        """
        first = images[0]
        rows_SD = torch.cat((*images, first.new_zeros(1, first.shape[1])))
        start, shifted = 0, []
        for image, place in zip(images, places, strict=True):
            shifted.append(torch.where(place < 0, len(rows_SD) - 1, place + start))
            start += len(image)
        return rows_SD[torch.cat(shifted)]


class Prune(Compressor):
    """[T, D] -> [max(1, T // ratio), D]: one of every `ratio` embeddings stays as it is.

    SpecVLM's Prune drops embeddings at random. The middle one of every stretch is as evenly spread
    and reproducible.
    """

    name = "prune"

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """See `Compressor.forward`."""
        return self.gather(images, [middles(self.borders(image)) for image in images])


class Pool(Compressor):
    """[T, D] -> [max(1, T // ratio), D]: the mean of every `ratio` embeddings (SpecVLM's Pool).

    Along the sequence, which also serves images cut into tiles and those with row breaks.
    """

    name = "pool"

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """See `Compressor.forward`."""
        rows_SD = torch.cat(list(images))
        length_A = torch.cat([self.borders(image).diff() for image in images])
        token_A = torch.arange(len(length_A), device=rows_SD.device)
        # The number of rows is known, so the host need not wait for the lengths.
        token_S = torch.repeat_interleave(token_A, length_A, output_size=len(rows_SD))
        sum_AD = rows_SD.new_zeros(len(length_A), rows_SD.shape[1]).index_add(0, token_S, rows_SD)
        return sum_AD / length_A[:, None]


class Conv(Compressor):
    """[T, D] -> [max(1, T // ratio), D]: a convolution, kernel and stride `ratio` (SpecVLM's Conv).

    It has ratio * D * D + D parameters, which is why high ratios are impractical. An image shorter
    than the kernel is filled up with zeros.
    """

    name = "conv"

    def __init__(self, spec: CompressorSpec, hidden_size: int, num_heads: int, bias: bool) -> None:
        super().__init__(spec, hidden_size, num_heads, bias)
        self.kernel = nn.Linear(spec.amount * hidden_size, hidden_size)

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """See `Compressor.forward`."""
        window_AWD = self.gather(images, [self._windows(image) for image in images])
        return self.kernel(window_AWD.flatten(1))

    def _windows(self, image_TD: Tensor) -> Tensor:
        """Embeddings under the kernel for every token, int64 [M, W]; -1 behind the image's end."""
        offset_W = torch.arange(self.spec.amount, device=image_TD.device)
        window_MW = self.borders(image_TD)[:-1, None] + offset_W
        return torch.where(window_MW < len(image_TD), window_MW, -1)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Begin as the mean of the window, disturbed a little."""
        ratio, size = self.spec.amount, self.hidden_size
        std = CONV_NOISE * self.kernel.in_features**-0.5
        nn.init.normal_(self.kernel.weight, std=std, generator=generator)
        self.kernel.weight.add_(torch.eye(size).repeat(1, ratio) / ratio)
        nn.init.zeros_(self.kernel.bias)


class CrossAttention(nn.Module):
    """Learned queries that attend over the embeddings of one image.

    There is no query projection, no position, no residual and no norm. ViSpec's adaptor and the
    resampler have this one definition.
    """

    def __init__(self, num_queries: int, hidden_size: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.head_dim = num_heads, hidden_size // num_heads
        self.query = nn.Parameter(torch.empty(num_queries, self.heads, self.head_dim))
        nn.init.normal_(self.query, std=self.head_dim**-0.5)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, images_RTD: Tensor, valid_RT: Tensor | None = None) -> Tensor:
        """Embeddings of padded images -> [R, Q, D].

        Args:
            valid_RT: True where an embedding belongs to its image, at least one of each; None: all.
        """
        shape = (self.heads, self.head_dim)
        k_RHTK = self.k_proj(images_RTD).unflatten(-1, shape).transpose(1, 2)
        v_RHTK = self.v_proj(images_RTD).unflatten(-1, shape).transpose(1, 2)
        q_HQK = self.query.to(images_RTD.dtype).transpose(0, 1)
        mask = None if valid_RT is None else valid_RT[:, None, None, :]
        out_RHQK = F.scaled_dot_product_attention(
            q_HQK.expand(len(images_RTD), -1, -1, -1), k_RHTK, v_RHTK, attn_mask=mask
        )
        return self.o_proj(out_RHQK.transpose(1, 2).flatten(2))

    def of_images(self, images: Sequence[Tensor]) -> Tensor:
        """Embeddings of images, each [T, D] with its own T -> [R, Q, D], all at once."""
        images_RTD = nn.utils.rnn.pad_sequence(list(images), batch_first=True)
        if len({len(image) for image in images}) == 1:
            return self(images_RTD)
        sizes_R = torch.tensor([len(image) for image in images], device=images_RTD.device)
        index_T = torch.arange(images_RTD.shape[1], device=images_RTD.device)
        return self(images_RTD, index_T < sizes_R[:, None])


class Resampler(Compressor):
    """[T, D] -> [queries, D]: one cross-attention (SpecVLM's Resampler).

    It has queries * D + 3 * D * D parameters, and 2 * D more with biases.
    """

    name = "resampler"

    def __init__(self, spec: CompressorSpec, hidden_size: int, num_heads: int, bias: bool) -> None:
        super().__init__(spec, hidden_size, num_heads, bias)
        self.attention = CrossAttention(spec.amount, hidden_size, num_heads, bias)

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """See `Compressor.forward`."""
        return self.attention.of_images(images).flatten(0, 1)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Normal queries; the projections begin like any other of the head."""
        std = self.attention.head_dim**-0.5
        nn.init.normal_(self.attention.query, std=std, generator=generator)


class TextOnly(Compressor):
    """[T, D] -> [0, D]: the draft sees nothing of an image (SpecVLM's fifth branch)."""

    name = "text_only"

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """See `Compressor.forward`."""
        return images[0][:0]


class Identity(Compressor):
    """[T, D] -> [T, D]: every embedding stays, and is a layer input as it is (MSD)."""

    name = "identity"

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """See `Compressor.forward`."""
        return torch.cat(list(images))


# A new primitive is a class above, an entry here and one in `spec.PRIMITIVES`.
COMPRESSORS: Mapping[str, type[Compressor]] = {
    entry.name: entry for entry in (Prune, Pool, Conv, Resampler, TextOnly, Identity)
}


class ImageCompressor(nn.Module):
    """All branches of a head's compressor.

    ViSpec's query adaptor is not built here: it shares its queries with the global feature.
    """

    def __init__(self, spec: CompressorSpec, hidden_size: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        self.spec = spec
        self.branches = nn.ModuleList(
            COMPRESSORS[branch.name](branch, hidden_size, num_heads, bias)
            for branch in spec.primitives
        )
        self.gate = Gate(hidden_size, len(self.branches)) if spec.gated else None

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Compress images, each [T, D] with its own T of at least 1.

        Returns:
            [M, D] for every image, branch after branch, as `places.place_tokens` counts them.
        """
        if not images:
            return []
        parts: list[list[Tensor]] = [[] for _ in images]
        for branch in self.branches:
            counts = [num_tokens(branch.spec, len(image)) for image in images]
            for part, tokens in zip(parts, branch(images).split(counts), strict=True):
                part.append(tokens)
        return [torch.cat(part) for part in parts]

    def decide(
        self, state_GD: Tensor, noise_GK: Tensor | None = None, temperature: float = 1.0
    ) -> GateOutput:
        """What requests with these states at their prompts' ends see; gated compressors only."""
        assert self.gate is not None
        return DECISIONS[self.spec.name](self.gate(state_GD), noise_GK, temperature)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Set the weights of a new compressor whose linear layers are random already."""
        for branch in self.branches:
            branch.init_weights(generator)
        if self.gate is not None:
            self.gate.init_weights()
