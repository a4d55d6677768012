"""From a folder of images to a conversation file that asks about each of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path

from vllm_vispec.data.regenerate.journal import beside
from vllm_vispec.utils.errors import ViSpecError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
DEFAULT_QUESTION = "Describe this image."


def write_questions(folder: Path, output: Path, questions: Sequence[str] = ()) -> Path:
    """Ask one question about every image below a folder, the questions in turns.

    Image paths in the file start from the file's own folder. The same images and questions give
    the same file, so a stopped job goes on.

    Returns:
        The file, beside the output.

    Raises:
        ViSpecError: the folder has no image, or the file has other questions.
    """
    images = sorted(_images(folder))
    if not images:
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ViSpecError(f"--input {folder} has no image ({known}): give a folder of images")
    file = beside(output, "questions.jsonl")
    asked = zip(images, cycle(questions or (DEFAULT_QUESTION,)), strict=False)
    lines = [_line(folder, image, file.parent, question) for image, question in asked]
    content = "".join(line + "\n" for line in lines)
    if file.is_file() and file.read_text(encoding="utf-8") != content:
        raise ViSpecError(
            f"{file} has other questions than the images in {folder} would get now: choose another "
            "--output, or go on with --input and that file"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    return file


def _images(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
            yield path


def _line(folder: Path, image: Path, start: Path, question: str) -> str:
    content = [
        {"type": "image", "image": os.path.relpath(image, start)},
        {"type": "text", "text": question},
    ]
    messages = [{"role": "user", "content": content}]
    return json.dumps({"id": image.relative_to(folder).as_posix(), "messages": messages})
