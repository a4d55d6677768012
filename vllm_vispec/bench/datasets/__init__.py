"""Datasets to benchmark with. A new one is one `Adapter` in `ADAPTERS`."""

from vllm_vispec.bench.datasets.images import with_image_pixels, without_images
from vllm_vispec.bench.datasets.load import ADAPTERS, load_dataset
from vllm_vispec.bench.datasets.types import (
    CATEGORIES,
    UNLABELLED,
    Adapter,
    DatasetOptions,
    LoadedDataset,
)

__all__ = [
    "ADAPTERS",
    "CATEGORIES",
    "UNLABELLED",
    "Adapter",
    "DatasetOptions",
    "LoadedDataset",
    "load_dataset",
    "with_image_pixels",
    "without_images",
]
