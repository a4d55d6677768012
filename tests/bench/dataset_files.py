"""Small dataset files, and what came out of loading them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_vispec.bench.datasets import LoadedDataset
from vllm_vispec.bench.schema import BenchSample


def picture(file: Path, size: tuple[int, int] = (8, 6), color: str = "red") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(file)
    return file


def write_lines(file: Path, *records: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return file


def write_json(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), "utf-8")
    return file


def by_id(dataset: LoadedDataset) -> dict[str, BenchSample]:
    return {sample.sample_id: sample for sample in dataset.samples}


def rejections(dataset: LoadedDataset) -> dict[str, str]:
    return {item.sample_id: item.reason for item in dataset.rejected}
