"""Questions whose images have a wanted number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vllm_vispec.bench.datasets import with_image_pixels, without_images
from vllm_vispec.bench.schema import IMAGES_AS_THEY_ARE, BenchSample
from vllm_vispec.utils.errors import ViSpecError

SIDES_PX = range(4, 4097, 4)
USUAL_TOKEN_PX = 28
"""Side of what a token stands for in most targets; decides between sizes that are equally good."""
TOLERANCE = 0.1
"""Share by which an image may miss the wanted number of tokens: sizes come in steps."""

TokensOf = Callable[[int], int]
"""Tokens of a square image by its side in pixels."""


def samples_for(
    samples: Sequence[BenchSample], image_tokens: int, tokens_of: TokensOf, folder: Path
) -> tuple[BenchSample, ...]:
    """Return the samples of a cell.

    With a number of tokens, 0 included, those samples are asked that have images, so that cells
    with different numbers ask the same. Their images become squares that share the tokens evenly.

    Args:
        image_tokens: of each request, or `IMAGES_AS_THEY_ARE`.
        folder: gets the resized images.

    Raises:
        ViSpecError: no sample has an image, or the target cannot be given that many tokens.
    """
    if image_tokens == IMAGES_AS_THEY_ARE:
        return tuple(samples)
    chosen = [sample for sample in samples if sample.images]
    if not chosen:
        raise ViSpecError(
            f"--image-tokens {image_tokens}: no sample of the dataset has an image; leave the "
            "option out"
        )
    if image_tokens == 0:
        return tuple(without_images(sample) for sample in chosen)
    side_for = cache(lambda tokens: find_side(tokens, tokens_of))
    return tuple(
        with_image_pixels(sample, side, side, folder)
        for sample in chosen
        for side in [side_for(image_tokens // len(sample.images))]
    )


def find_side(tokens: int, tokens_of: TokensOf) -> int:
    """Return the side of a square image that has this many tokens, as nearly as sizes allow.

    Raises:
        ViSpecError: no size comes near.
    """
    usual = USUAL_TOKEN_PX * tokens**0.5
    best = min(SIDES_PX, key=lambda side: (abs(tokens_of(side) - tokens), abs(side - usual)))
    if abs(tokens_of(best) - tokens) > TOLERANCE * tokens:
        raise ViSpecError(
            f"--image-tokens: the target gives an image {tokens_of(best)} tokens where {tokens} "
            'are wanted; leave the option out, or widen its limits with --serve "--mm-processor-'
            'kwargs ..." (Qwen: min_pixels, max_pixels)'
        )
    return best


def tokens_of_target(target: str, processor_kwargs: Mapping[str, Any]) -> TokensOf:
    """Return how many tokens a target's processor gives to square images.

    Args:
        processor_kwargs: what the server gets as `--mm-processor-kwargs`.

    Raises:
        ViSpecError: the target has no processor that tells.
    """
    from vllm_vispec.data.template import load_processor

    processor = load_processor(target)
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is None:
        raise ViSpecError(
            f"--image-tokens: the processor of {target} does not tell how many tokens an image "
            "has; leave the option out"
        )

    @cache
    def tokens_of(side: int) -> int:
        return int(count(image_sizes=[(side, side)], **processor_kwargs)["num_image_tokens"][0])

    return tokens_of
