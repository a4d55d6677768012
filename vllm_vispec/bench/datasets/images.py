"""Images of samples: checking them, resizing them, leaving them out."""

from __future__ import annotations

import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from vllm_vispec.bench.schema import BenchSample
from vllm_vispec.data.images import BadImage, open_image
from vllm_vispec.data.types import Part
from vllm_vispec.utils.errors import ViSpecError


class ImageCheck:
    """Tells what is wrong with a sample's images; opens each file once."""

    def __init__(self) -> None:
        self._found: dict[str, str | None] = {}

    def __call__(self, sample: BenchSample) -> str | None:
        """Return why an image cannot be read, None if all can."""
        problems = (self._problem(path) for path in sample.images)
        return next((problem for problem in problems if problem is not None), None)

    def _problem(self, path: str) -> str | None:
        if path not in self._found:
            try:
                open_image(path, None)
                self._found[path] = None
            except BadImage as error:
                self._found[path] = str(error)
        return self._found[path]


def with_image_pixels(sample: BenchSample, width: int, height: int, folder: Path) -> BenchSample:
    """Return the sample with copies of its images that have `width` x `height` pixels.

    The aspect ratio is not kept: requests of one cell are to have equally many image tokens. Each
    image of a sample gets this size, so its share of the tokens is the caller's to divide. The
    copies are PNG files in `folder`, named after the content and the size, and made once.

    Raises:
        ViSpecError: the size is not positive, an image cannot be read, or a copy cannot be written.
    """
    if width < 1 or height < 1:
        raise ViSpecError(f"image size {width}x{height} has no pixels: use at least 1x1")
    copies = {path: str(_resized(path, width, height, folder)) for path in sample.images}
    turns = tuple(
        replace(
            turn,
            parts=tuple(
                replace(part, image=copies[part.image]) if part.image else part
                for part in turn.parts
            ),
        )
        for turn in sample.turns
    )
    return replace(sample, turns=turns)


def without_images(sample: BenchSample) -> BenchSample:
    """Return the sample with text alone; a turn that was only images says so in words."""
    said = (Part(text="(no image)"),)
    turns = tuple(
        replace(turn, parts=tuple(part for part in turn.parts if not part.image) or said)
        for turn in sample.turns
    )
    return replace(sample, turns=turns)


def _resized(path: str, width: int, height: int, folder: Path) -> Path:
    from PIL.Image import Resampling

    target = folder / f"{_digest(path)}-{width}x{height}.png"
    if target.is_file():
        return target.resolve()
    try:
        image = open_image(path, None).resize((width, height), Resampling.BICUBIC)
    except BadImage as error:
        raise ViSpecError(f"{error}; remove its record from the dataset") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Another process may be writing the same copy: each fills its own file, the last one wins.
        draft = target.with_suffix(f".{os.getpid()}.tmp")
        image.save(draft, format="PNG")
        draft.replace(target)
    except OSError as error:
        raise ViSpecError(
            f"resized image of {path} cannot be written to {folder} ({error.strerror or error}): "
            "choose another folder"
        ) from error
    return target.resolve()


def _digest(path: str) -> str:
    try:
        return sha256(Path(path).read_bytes()).hexdigest()[:24]
    except OSError as error:
        raise ViSpecError(
            f"image {path} cannot be read ({error.strerror or error}); remove its record from the "
            "dataset"
        ) from error
