"""From a folder to a checked `HeadInfo`, and from there to canonical tensors.

`inspect_head` runs at configuration time in the API server process: it reads config.json and
safetensors headers only and imports no vLLM, and torch only for a head with a compressor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.families import describe_family
from vllm_vispec.heads.files import (
    TensorEntry,
    read_entries,
    read_json,
    resolve_head,
    short_list,
    weight_files,
)
from vllm_vispec.heads.formats.base import DIALECTS, Dialect, Shapes
from vllm_vispec.utils.errors import ViSpecError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "HeadInfo",
    "inspect_head",
    "is_vispec_head",
    "iter_canonical_tensors",
    "resolve_head",
]


@dataclass(frozen=True)
class HeadInfo:
    """A head that was found complete and consistent.

    Attributes:
        dialect: name of its dialect.
        config: what the engine has to know.
        folder: where it lies.
        files: its safetensors files.
        shapes: canonical name -> shape.
        sources: canonical name -> (name in the file, entry).
        dtype: the safetensors dtype of most of its tensors, e.g. "BF16".
    """

    dialect: str
    config: HeadConfig
    folder: Path
    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    sources: Mapping[str, tuple[str, TensorEntry]]
    dtype: str


def inspect_head(path_or_hub_id: str | Path, revision: str | None = None) -> HeadInfo:
    """Recognise a head's dialect and check it, reading config.json and headers only.

    Args:
        path_or_hub_id: a folder, or a hub id that is downloaded first.
        revision: of the hub repository.

    Raises:
        ViSpecError: anything that would make loading fail later; the message names the file,
            tensor or field and the remedy.
    """
    folder = resolve_head(path_or_hub_id, revision)
    config = read_json(folder / "config.json")
    files = weight_files(folder)
    entries = read_entries(files)
    raw_shapes = {name: entry.shape for name, entry in entries.items()}
    dialect = _detect(folder, config, raw_shapes)
    head = _head_config(dialect, config, raw_shapes)
    sources = _to_canonical(dialect, head, entries)
    _check_shapes(dialect, head, sources)
    return HeadInfo(
        dialect=dialect.name,
        config=head,
        folder=folder,
        files=tuple(files),
        shapes={name: entry.shape for name, (_, entry) in sources.items()},
        sources=sources,
        dtype=_main_dtype(sources),
    )


def is_vispec_head(folder: str | Path) -> bool:
    """Whether a folder looks like a ViSpec head, a complete and consistent one or not."""
    folder = Path(folder)
    try:
        config = read_json(folder / "config.json")
    except ViSpecError:
        return False
    try:
        shapes = {name: entry.shape for name, entry in read_entries(weight_files(folder)).items()}
    except ViSpecError:
        shapes = {}
    return any(dialect.detect(config, shapes) for dialect in DIALECTS.values())


def iter_canonical_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (canonical name, tensor on CPU in the stored dtype), one in memory at a time.

    Raises:
        ViSpecError: see `inspect_head`.
    """
    from safetensors import safe_open

    info = inspect_head(folder)
    ordered = sorted(info.sources.items(), key=lambda item: str(item[1][1].file))
    for file, group in groupby(ordered, key=lambda item: item[1][1].file):
        with safe_open(str(file), framework="pt") as weights:
            for canonical_name, (source_name, _) in group:
                yield canonical_name, weights.get_tensor(source_name)


def _detect(folder: Path, config: Mapping[str, Any], shapes: Shapes) -> Dialect:
    for dialect in DIALECTS.values():
        if dialect.detect(config, shapes):
            return dialect
    family = describe_family(config, shapes)
    if family is not None:
        raise ViSpecError(f"{folder} is {family}; ViSpec needs a head with an image adaptor")
    raise ViSpecError(
        f"{folder} is of an unknown dialect (architectures {config.get('architectures')!r}, "
        f"tensors {short_list(sorted(shapes))}): expected one of {', '.join(DIALECTS)}; give a "
        "ViSpec head, or add its dialect"
    )


def _head_config(dialect: Dialect, config: Mapping[str, Any], shapes: Shapes) -> HeadConfig:
    if not is_draft_vlm(config):
        _refuse_more_layers(shapes)
    return dialect.head_config(config, shapes)


def is_draft_vlm(config: Mapping[str, Any]) -> bool:
    """Whether a head's config.json says that it is a draft VLM."""
    section = config.get("vispec")
    return isinstance(section, Mapping) and bool(section.get("vision_size"))


def _refuse_more_layers(shapes: Shapes) -> None:
    layers = {name.split(".")[1] for name in shapes if name.startswith("layers.")}
    if len(layers) > 1:
        raise ViSpecError(
            f"the head has {len(layers)} decoder layers (layers.{', layers.'.join(sorted(layers))})"
            ": only heads with one are supported, train or export one with a single layer"
        )


def _to_canonical(
    dialect: Dialect, head: HeadConfig, entries: Mapping[str, TensorEntry]
) -> dict[str, tuple[str, TensorEntry]]:
    """Rename, and refuse what is missing or left over."""
    expected = head.tensor_shapes()
    sources: dict[str, tuple[str, TensorEntry]] = {}
    extra: list[str] = []
    for name, entry in entries.items():
        if dialect.is_ignored(name):
            continue
        canonical = dialect.canonical_name(name)
        if canonical in expected:
            sources[canonical] = (name, entry)
        elif canonical not in dialect.switched_off:
            extra.append(name)
    missing = [dialect.source_name(name) for name in expected if name not in sources]
    if missing:
        raise ViSpecError(
            f"the head ({dialect.name} dialect) lacks {len(missing)} tensor(s): "
            f"{short_list(missing)}: download or export it again, or correct the compressor and "
            "the bias and norm flags in its config.json"
        )
    if extra:
        raise ViSpecError(
            f"the head ({dialect.name} dialect) has {len(extra)} tensor(s) that its config.json "
            f"does not account for: {short_list(sorted(extra))}: correct the compressor and the "
            "bias and norm flags there, or remove them"
        )
    return {name: sources[name] for name in expected}


def _check_shapes(
    dialect: Dialect, head: HeadConfig, sources: Mapping[str, tuple[str, TensorEntry]]
) -> None:
    for name, expected in head.tensor_shapes().items():
        source_name, entry = sources[name]
        if entry.shape != expected:
            raise ViSpecError(
                f"tensor {source_name!r} of the head ({dialect.name} dialect) has shape "
                f"{list(entry.shape)}, config.json asks for {list(expected)}: use the config.json "
                "that belongs to these weights"
            )


def _main_dtype(sources: Mapping[str, tuple[str, TensorEntry]]) -> str:
    dtypes = [entry.dtype for _, entry in sources.values()]
    return max(set(dtypes), key=dtypes.count)
