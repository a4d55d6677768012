"""Opening images, with every way in which that fails turned into one line."""

from __future__ import annotations

import base64
import mimetypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_vispec.utils.errors import first_line

if TYPE_CHECKING:
    from PIL.Image import Image

_END_BYTES = 4096


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
    with _opened(path, root) as image:
        return image.convert("RGB")


def image_size(path: str, root: Path | None) -> tuple[int, int]:
    """Return height and width of an image that decodes; of a JPEG an eighth of it is decoded.

    Raises:
        BadImage: see `open_image`.
    """
    with _opened(path, root) as image:
        width, height = image.size
        image.draft(None, (1, 1))
        image.load()
        return height, width


def image_fingerprint(path: str, root: Path | None) -> str:
    """Return what tells an image's content from another's: its size, and a digest of its ends.

    Formats store images compressed, so a change anywhere moves the end. "" without a file.
    """
    try:
        file = image_file(path, root)
        with file.open("rb") as source:
            ends = source.read(_END_BYTES)
            size = source.seek(0, os.SEEK_END)
            source.seek(max(size - _END_BYTES, 0))
            return f"{size} {sha256(ends + source.read()).hexdigest()}"
    except (BadImage, OSError):
        return ""


@contextmanager
def _opened(path: str, root: Path | None) -> Iterator[Image]:
    from PIL import Image as PilImage

    file = image_file(path, root)
    try:
        with PilImage.open(file) as image:
            yield image
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
