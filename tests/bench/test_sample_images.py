"""Resizing the images of a sample, and leaving them out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.bench.dataset_files import picture
from vllm_vispec.bench.datasets import (
    with_image_pixels,
    without_images,
)
from vllm_vispec.bench.schema import BenchSample
from vllm_vispec.data.types import Part, Turn
from vllm_vispec.utils.errors import ViSpecError


@pytest.fixture
def sample(tmp_path: Path) -> BenchSample:
    images = [picture(tmp_path / "in" / f"{color}.png", color=color) for color in ("red", "blue")]
    parts = (Part(text="Compare"), *(Part(image=str(image)) for image in images))
    turns = (Turn("system", (Part(text="Be brief."),)), Turn("user", parts))
    return BenchSample("x", "vqa", turns, 16)


def test_resized_copies(sample: BenchSample, tmp_path: Path) -> None:
    before = [Path(image).read_bytes() for image in sample.images]
    resized = with_image_pixels(sample, 56, 28, tmp_path / "out")
    colors = []
    for image in resized.images:
        with Image.open(image) as opened:
            assert opened.size == (56, 28)
            colors.append(opened.getpixel((5, 5)))
    assert colors == [(255, 0, 0), (0, 0, 255)]
    assert [Path(image).read_bytes() for image in sample.images] == before
    # All but the images is as it was.
    assert replace(resized, turns=sample.turns) == sample
    assert [turn.text for turn in resized.turns] == [turn.text for turn in sample.turns]


def test_resized_copies_are_made_once_per_content(sample: BenchSample, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = with_image_pixels(sample, 56, 28, out)
    stamps = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert with_image_pixels(sample, 56, 28, out) == first
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == stamps
    assert len(stamps) == 2
    with_image_pixels(sample, 28, 28, out)
    assert len(list(out.iterdir())) == 4


def test_resizing_errors(sample: BenchSample, tmp_path: Path) -> None:
    with pytest.raises(ViSpecError, match="image size 0x28 has no pixels"):
        with_image_pixels(sample, 0, 28, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ViSpecError, match=r"cannot be written .*make the folder writable"):
        with_image_pixels(sample, 28, 28, tmp_path / "file" / "out")
    Path(sample.images[0]).write_bytes(b"no picture")
    with pytest.raises(ViSpecError, match=r"cannot be read.*remove its record"):
        with_image_pixels(sample, 28, 28, tmp_path / "out")
    Path(sample.images[0]).unlink()
    with pytest.raises(ViSpecError, match=r"cannot be read.*remove its record"):
        with_image_pixels(sample, 28, 28, tmp_path / "out")


def test_without_images(sample: BenchSample) -> None:
    text = without_images(sample)
    assert text.images == ()
    assert [turn.text for turn in text.turns] == ["Be brief.", "Compare"]
    only_image = replace(sample, turns=(Turn("user", sample.turns[1].parts[1:]),))
    assert without_images(only_image).turns == (Turn("user", (Part(text="(no image)"),)),)
