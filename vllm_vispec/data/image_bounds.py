"""How many pixels an image has when a target reads it: one pair of bounds for a whole pipeline.

Qwen VLs scale an image to at least `min_pixels` and at most `max_pixels`; a token stands for a
square of 28 or 32 pixels. As published they take up to 16,384 tokens for one image: 15,301 for a
photo of 12 megapixels, which no training fits. ViSpec's data code reads images as 256 to 1,280
tokens (min_pixels 256*28*28, max_pixels 1280*28*28; github.com/KangJialiang/ViSpec,
vispec/ge_data). So do we, unless a processor has narrower bounds of its own.

`vispec regenerate` writes the bounds into every record, `vispec train` reads them there and notes
them in the head's provenance, from which the model card and `vispec eval` take them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm_vispec.data.types import Conversation
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.settings import as_flag

Bounds = dict[str, int]
"""`min_pixels` and `max_pixels`; empty for a target that scales every image to a fixed size."""
NAMES = ("min_pixels", "max_pixels")
TOKENS = (256, 1280)
"""ViSpec's bounds of an image, in tokens."""
UNBOUNDED_TOKENS = 16384
"""What published Qwen VLs allow."""


def bounds_in(values: Mapping[str, Any] | None) -> Bounds:
    """Return the bounds among other values; a bound of 0 or none does not count."""
    return {name: int(values[name]) for name in NAMES if values and values.get(name)}


def set_bounds(processor: Any, asked: Mapping[str, int]) -> Bounds:
    """Make a processor scale images to these bounds; returns the bounds in full.

    Args:
        asked: a bound that is missing is the processor's own, or ViSpec's where the processor takes
            images of 16,384 tokens.

    Raises:
        ViSpecError: the processor knows no bounds, or they are impossible.
    """
    images = processor.image_processor
    merge = getattr(images, "merge_size", None)
    if merge is None:
        if asked:
            raise ViSpecError(
                f"{' and '.join(asked)}: the target's processor ({type(images).__name__}) scales "
                "every image to a fixed size: drop the setting"
            )
        return {}
    edges = [images.size.shortest_edge, images.size.longest_edge]
    unit = (images.patch_size * merge) ** 2
    unbounded = edges[1] >= UNBOUNDED_TOKENS * unit
    usual = [count * unit for count in TOKENS] if unbounded else edges
    bounds: Bounds = {**dict(zip(NAMES, usual, strict=True)), **asked}
    if not unit <= bounds["min_pixels"] <= bounds["max_pixels"]:
        raise ViSpecError(
            f"min_pixels {bounds['min_pixels']} and max_pixels {bounds['max_pixels']} are no "
            f"bounds: give the smaller one first, at least {unit} (one token of this target)"
        )
    images.size = type(images.size)(
        shortest_edge=bounds["min_pixels"], longest_edge=bounds["max_pixels"]
    )
    return bounds


def recorded_bounds(
    conversations: Iterable[Conversation], where: str, wanted: Mapping[str, int] | None = None
) -> Bounds:
    """Return the bounds that answers about images were made with; none if none of them says.

    Args:
        where: the setting that names the files.
        wanted: what is set, which holds for answers that do not say.

    Raises:
        ViSpecError: they were made with different ones, some do not say while others do, or a
            record's are no numbers.
    """
    found: dict[tuple[tuple[str, int], ...], str] = {}
    for one in (one for one in conversations if one.images):
        try:
            found[tuple(bounds_in(one.extra).items())] = one.sample_id
        except (TypeError, ValueError) as error:
            raise ViSpecError(
                f"{where}: min_pixels or max_pixels of sample {one.sample_id} is no whole number: "
                "correct the record"
            ) from error
    silent = found.pop((), None)
    if found and silent is not None and not wanted:
        known, sample = next(iter(found.items()))
        raise ViSpecError(
            f"{where} holds answers made with {_text(dict(known))} (sample {sample}), and some "
            f"that do not say with which (sample {silent}): set min_pixels and max_pixels if all "
            "were made with these, or make them again with `vispec regenerate`"
        )
    if len(found) > 1:
        (bounds, first), (others, second), *_ = found.items()
        raise ViSpecError(
            f"{where} holds answers made with different image bounds ({_text(dict(bounds))} of "
            f"sample {first}, {_text(dict(others))} of {second}): make them with the same"
        )
    return dict(next(iter(found), ()))


def same_bounds(wanted: Bounds, recorded: Bounds, where: str, why: str = "") -> Bounds:
    """Return the bounds to read answers with: those they were made with, else the wanted ones.

    Args:
        why: where the wanted ones come from, for the message.

    Raises:
        ViSpecError: both are given and differ.
    """
    if any(name in recorded and recorded[name] != value for name, value in wanted.items()):
        options = " ".join(f"{as_flag(name)} {value}" for name, value in wanted.items())
        raise ViSpecError(
            f"{where} holds answers made with {_text(recorded)}, {why or 'the settings are'} "
            f"{_text(wanted)}: use the same, or make the answers again with `vispec regenerate "
            f"{options}`"
        )
    return wanted | recorded


def _text(bounds: Bounds) -> str:
    return " and ".join(f"{name} {value}" for name, value in bounds.items())
