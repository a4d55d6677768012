"""A head's compressor: one primitive, or branches with or without a gate; and the registry.

Tensor names: as in `models.base` and `models.gate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vllm_vispec.compressors.base import Compressor
from vllm_vispec.compressors.conv import Conv
from vllm_vispec.compressors.gate import DECISIONS, Gate, GateOutput
from vllm_vispec.compressors.places import num_tokens
from vllm_vispec.compressors.pool import Pool
from vllm_vispec.compressors.prune import Prune
from vllm_vispec.compressors.resampler import Resampler
from vllm_vispec.compressors.spec import CompressorSpec
from vllm_vispec.compressors.text_only import TextOnly

# A new primitive is a file, an entry here and one in `models.spec.PRIMITIVES`.
COMPRESSORS: Mapping[str, type[Compressor]] = {
    entry.name: entry for entry in (Prune, Pool, Conv, Resampler, TextOnly)
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
            counts = [branch.num_tokens(len(image)) for image in images]
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
    def start(self, generator: torch.Generator) -> None:
        """Set the weights of a fresh compressor whose linear layers are random already."""
        for branch in self.branches:
            branch.start(generator)
        if self.gate is not None:
            self.gate.start()


def compressor_shapes(
    spec: CompressorSpec, hidden_size: int, num_heads: int, bias: bool
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a head's compressor, as `ImageCompressor` names them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, branch in enumerate(spec.primitives):
        found = COMPRESSORS[branch.name].tensor_shapes(branch, hidden_size, num_heads, bias)
        shapes |= {f"branches.{index}.{name}": shape for name, shape in found.items()}
    if spec.gated:
        gate = Gate.tensor_shapes(hidden_size, len(spec.primitives))
        shapes |= {f"gate.{name}": shape for name, shape in gate.items()}
    return shapes


def compressor_cost(spec: CompressorSpec, hidden_size: int, size: int) -> tuple[int, int]:
    """Tokens and floating point operations for one image of `size` embeddings, gate left out."""
    tokens = sum(num_tokens(branch, size) for branch in spec.primitives)
    flops = sum(
        COMPRESSORS[branch.name].flops(branch, hidden_size, size) for branch in spec.primitives
    )
    return tokens, flops
