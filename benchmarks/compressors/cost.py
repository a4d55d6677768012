"""What a head keeps of an image and computes for it, from its configuration alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vllm_vispec.compressors.places import num_tokens, place_tokens
from vllm_vispec.compressors.spec import CompressorSpec
from vllm_vispec.heads.config import HeadConfig

IMAGE_TOKENS = (64, 256, 1024)


@dataclass(frozen=True)
class ImageCost:
    """One image of `image_tokens` tokens in the draft.

    Attributes:
        kv_tokens: rows with keys and values that queries can see; the rest are masked.
        seen: of these, fewest and most that a request sees; they differ where a gate selects.
        megaflops: to make its tokens, and their inputs, keys and values in the layer.
    """

    image_tokens: int
    kv_tokens: int
    seen: tuple[int, int]
    megaflops: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def image_cost(config: HeadConfig, image_tokens: int) -> ImageCost:
    """What one image costs a head."""
    kept = kept_rows(config, image_tokens)
    seen = (
        kept if config.has_compressor and config.compressor_spec.name == "select" else [sum(kept)]
    )
    width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
    # A token goes through half of fc; an image token that stays a text row through all of it.
    inputs = 2 * width * width * (1 if config.compress else 2)
    flops = sum(kept) * (inputs + 4 * width * kv_width) + _compressor_flops(config, image_tokens)
    return ImageCost(image_tokens, sum(kept), (min(seen), max(seen)), flops / 1e6)


def kept_rows(config: HeadConfig, image_tokens: int) -> list[int]:
    """Rows of one image that are not masked, branch by branch."""
    if not config.compress:
        return [image_tokens]
    if config.rows_per_image is not None:
        return [min(config.rows_per_image, image_tokens)]
    spec = config.compressor_spec
    branches = place_tokens(spec, image_tokens).branches.tolist()
    return [branches.count(number) for number in range(len(spec.primitives))]


def _compressor_flops(config: HeadConfig, image_tokens: int) -> int:
    width, flops = config.hidden_size, 0
    if config.has_adaptor:
        queries = CompressorSpec("resampler", config.num_query_tokens)
        flops += primitive_flops(queries, width, image_tokens)
    if config.has_compressor:
        branches = config.compressor_spec.primitives
        flops += sum(primitive_flops(branch, width, image_tokens) for branch in branches)
    return flops


def primitive_flops(spec: CompressorSpec, width: int, size: int) -> int:
    """Floating point operations of a primitive for an image of `size` embeddings; 0 for copying."""
    if spec.name == "pool":
        return size * width
    if spec.name == "conv":
        return 2 * num_tokens(spec, size) * spec.amount * width**2
    if spec.name == "resampler":
        # Keys and values, scores and sums, and the output projection.
        attended = 4 * size * width**2 + 4 * spec.amount * size * width
        return attended + 2 * spec.amount * width**2
    return 0
