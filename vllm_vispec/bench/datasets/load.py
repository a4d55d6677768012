"""Loading a dataset by the name of its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from vllm_vispec.bench.datasets import conversation_files, mmspec, vispec
from vllm_vispec.bench.datasets.build import build_samples
from vllm_vispec.bench.datasets.choose import choose
from vllm_vispec.bench.datasets.images import ImageCheck
from vllm_vispec.bench.datasets.types import Adapter, DatasetOptions, LoadedDataset
from vllm_vispec.utils.errors import ViSpecError

_ADAPTERS = (mmspec.ADAPTER, vispec.ADAPTER, conversation_files.OPENAI, conversation_files.TINY)
ADAPTERS: Mapping[str, Adapter] = MappingProxyType({adapter.name: adapter for adapter in _ADAPTERS})
DEFAULT_OPTIONS = DatasetOptions()


def load_dataset(name: str, path: Path, options: DatasetOptions = DEFAULT_OPTIONS) -> LoadedDataset:
    """Read a dataset and choose the samples to ask.

    Args:
        name: of an adapter in `ADAPTERS`.
        path: file or folder, as the adapter says.

    Raises:
        ViSpecError: there is no such adapter, its files are missing, a wanted family does not
            occur, or no sample can be used; the message gives the first reason.
    """
    adapter = ADAPTERS.get(name)
    if adapter is None:
        raise ViSpecError(f"dataset {name} is unknown; there are {', '.join(ADAPTERS)}")
    max_tokens = options.max_tokens or adapter.max_tokens
    samples, rejected = build_samples(adapter.read(path, options), adapter, max_tokens)
    if not samples:
        raise _nothing(name, path, [item.reason for item in rejected])
    chosen, unreadable = choose(samples, options, ImageCheck())
    rejected += unreadable
    if not chosen:
        raise _nothing(name, path, [item.reason for item in rejected])
    not_chosen = len(samples) - len(chosen) - len(unreadable)
    return LoadedDataset(name, tuple(chosen), tuple(rejected), not_chosen)


def _nothing(name: str, path: Path, reasons: list[str]) -> ViSpecError:
    why = f"all {len(reasons)} records are unusable, first: {reasons[0]}" if reasons else "empty"
    return ViSpecError(f"dataset {name}: {path} gives no sample ({why}); check the file")
