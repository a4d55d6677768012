"""Images for the examples: a file of the user's, or held-out scenes of the tiny VLM."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def load_picture(file: Path | None, family: str = "captioning", index: int = 0) -> Image:
    """Return the image in ``file``, or the ``index``-th held-out image of a task family."""
    if file is None:
        return held_out_pictures(family, index + 1)[index]
    from PIL import Image as PilImage

    return PilImage.open(file).convert("RGB")


def held_out_pictures(family: str, count: int) -> list[Image]:
    """Return held-out images that the tiny VLM was not trained on."""
    from examples.tiny_vlm.samples import demo_samples

    return [sample.images[0] for sample in demo_samples(count, (family,))]


def to_data_url(image: Image) -> str:
    """Return the image as the ``data:`` URL that the OpenAI API takes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
