"""Opening images, with every way in which that fails turned into one line."""

from __future__ import annotations

import base64
import mimetypes
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_vispec.utils.errors import first_line

if TYPE_CHECKING:
    from PIL.Image import Image


class BadImage(ValueError):
    """An image that cannot be used; the text is the reason."""


def image_folder(file: Path, image_root: Path | None) -> Path:
    """Return the folder that relative image paths start from: the root, else the file's own."""
    return image_root if image_root is not None else file.parent


def image_file(path: str, root: Path | None) -> Path:
    """Return where an image is.

    Raises:
        BadImage: it is not a path on this machine or does not exist.
    """
    path = path.removeprefix("file://")
    if "://" in path or path.startswith("data:"):
        raise BadImage(f"image {path[:40]} is not a path; save it as a file")
    file = Path(path) if root is None else root / path
    if not file.is_file():
        raise BadImage(f"image {path} does not exist")
    return file


def open_image(path: str, root: Path | None) -> Image:
    """Return the decoded image as RGB.

    Raises:
        BadImage: it is missing, not an image, cut off, or too large to decode safely.
    """
    from PIL import Image as PilImage

    file = image_file(path, root)
    try:
        with PilImage.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, PilImage.DecompressionBombError) as error:
        raise BadImage(f"image {path} cannot be read: {first_line(error)}") from error


def data_url(path: str, root: Path) -> str:
    """Return an image file as a base64 data URL, once it is known to decode.

    Raises:
        BadImage: it is missing or broken.
    """
    open_image(path, root)
    file = image_file(path, root)
    mime_type = mimetypes.guess_type(file.name, strict=False)[0] or "image/png"
    return f"data:{mime_type};base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"
