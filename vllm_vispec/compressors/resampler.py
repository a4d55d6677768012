"""Resampler: learned queries and one cross-attention (SpecVLM's Resampler, ViSpec's adaptor).

No query projection, no positions, no residual, no norm. queries * D + 3 * D * D parameters (and 2 *
D with biases); keys and values of an image cost 4 * T * D * D operations.

Tensor names: as in `models.base`; Q queries, H heads, K head size, R images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_vispec.compressors.base import Compressor
from vllm_vispec.compressors.spec import CompressorSpec


class CrossAttention(nn.Module):
    """Learned queries that attend over the embeddings of one image."""

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

    @staticmethod
    def tensor_shapes(
        num_queries: int, hidden_size: int, num_heads: int, bias: bool
    ) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of the parameters."""
        square = (hidden_size, hidden_size)
        shapes: dict[str, tuple[int, ...]] = {
            "query": (num_queries, num_heads, hidden_size // num_heads),
            "k_proj.weight": square,
            "v_proj.weight": square,
            "o_proj.weight": square,
        }
        if bias:
            shapes |= {"k_proj.bias": (hidden_size,), "v_proj.bias": (hidden_size,)}
        return shapes


class Resampler(Compressor):
    """[T, D] -> [queries, D]."""

    name: ClassVar[str] = "resampler"

    def __init__(self, spec: CompressorSpec, hidden_size: int, num_heads: int, bias: bool) -> None:
        super().__init__(spec, hidden_size, num_heads, bias)
        self.attention = CrossAttention(spec.amount, hidden_size, num_heads, bias)

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """See `Compressor.forward`."""
        return self.attention.of_images(images).flatten(0, 1)

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """Normal queries; the projections start like any other of the head."""
        std = self.attention.head_dim**-0.5
        nn.init.normal_(self.attention.query, std=std, generator=generator)

    @classmethod
    def tensor_shapes(
        cls, spec: CompressorSpec, hidden_size: int, num_heads: int, bias: bool
    ) -> Mapping[str, tuple[int, ...]]:
        """Those of the attention."""
        shapes = CrossAttention.tensor_shapes(spec.amount, hidden_size, num_heads, bias)
        return {f"attention.{name}": shape for name, shape in shapes.items()}

    @classmethod
    def flops(cls, spec: CompressorSpec, hidden_size: int, size: int) -> int:
        """Keys and values, scores and sums, and the output projection."""
        attended = 4 * size * hidden_size**2 + 4 * spec.amount * size * hidden_size
        return attended + 2 * spec.amount * hidden_size**2
