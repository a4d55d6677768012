"""Reading a head's folder: config.json and safetensors headers, then the tensors.

`inspect_head` runs at configuration time in the API server process. It loads no tensor and imports
no vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from vllm_vispec.heads.config import HeadConfig
from vllm_vispec.heads.formats import (
    FORMATS,
    CheckpointFormat,
    describe_other_model,
    detect_format,
)
from vllm_vispec.heads.location import resolve_head
from vllm_vispec.utils.errors import ViSpecError

if TYPE_CHECKING:
    import torch

    from vllm_vispec.reference.draft import Draft

CONFIG, CARD, PROVENANCE, WEIGHTS = (
    "config.json",
    "README.md",
    "provenance.json",
    "model.safetensors",
)
DRAFT_VOCAB, DRAFT_VOCAB_FACTS = "draft_vocab.safetensors", "draft_vocab.json"
"""The list of tokens a draft may propose, and what `vispec vocab` says about it; both optional."""
DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Safetensors dtype -> the dtype in which such weights are written again."""
_INDEX = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies and what its header says."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class HeadInfo:
    """A head that was found complete and consistent.

    Attributes:
        checkpoint_format: name of the format it is written in.
        config: shape and flags.
        folder: where it lies.
        files: its safetensors files.
        sources: canonical name -> (name in the file, entry).
    """

    checkpoint_format: str
    config: HeadConfig
    folder: Path
    files: tuple[Path, ...]
    sources: Mapping[str, tuple[str, TensorEntry]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape."""
        return {name: entry.shape for name, (_, entry) in self.sources.items()}

    @property
    def dtype(self) -> str:
        """The safetensors dtype of most tensors, e.g. "BF16"."""
        dtypes = [entry.dtype for _, entry in self.sources.values()]
        return max(set(dtypes), key=dtypes.count)


def inspect_head(
    path_or_hub_id: str | Path, revision: str | None = None, checkpoint_format: str | None = None
) -> HeadInfo:
    """Recognise a head's checkpoint format and check that it is complete and consistent.

    Args:
        path_or_hub_id: a folder, or a hub id that is downloaded first.
        revision: of the hub repository.
        checkpoint_format: one of `formats.NAMED_FORMATS`; None: the folder tells.

    Raises:
        ViSpecError: anything that would make loading fail later; the message names the file,
            tensor or field and the remedy.
    """
    folder = resolve_head(path_or_hub_id, revision)
    config = read_json(folder / CONFIG)
    files = weight_files(folder)
    entries = read_entries(files)
    shapes = {name: entry.shape for name, entry in entries.items()}
    found = detect_format(config, shapes, checkpoint_format)
    if found is None:
        other = describe_other_model(config, shapes)
        if other is not None:
            raise ViSpecError(
                f"{folder} is {other}; ViSpec needs a head that sees images, or a published model "
                "that this vLLM serves (for vispec doctor: --draft)"
            )
        raise ViSpecError(
            f"{folder} is of an unknown checkpoint format (architectures "
            f"{config.get('architectures')!r}, tensors {short_list(sorted(shapes))}): expected one "
            f"of {', '.join(FORMATS)}; give a ViSpec head, or add its format"
        )
    if not is_draft_vlm(config):
        _refuse_more_layers(shapes)
    head = found.read_config(config, shapes)
    sources = _match_tensors(found, head, entries)
    return HeadInfo(found.name, head, folder, tuple(files), sources)


def is_vispec_head(folder: str | Path) -> bool:
    """Whether a folder looks like a ViSpec head, be it complete and consistent or not."""
    folder = Path(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        config = read_json(folder / CONFIG)
    except ViSpecError:
        return False
    with suppress(ViSpecError):
        shapes = {name: entry.shape for name, entry in read_entries(weight_files(folder)).items()}
    return detect_format(config, shapes) is not None


def is_draft_vlm(config: Mapping[str, Any]) -> bool:
    """Whether a head's config.json says that it is a draft VLM."""
    section = config.get("vispec")
    return isinstance(section, Mapping) and bool(section.get("vision_size"))


def iter_canonical_tensors(info: HeadInfo) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (canonical name, tensor on the CPU in the stored dtype), one in memory at a time."""
    ordered = sorted(info.sources.items(), key=lambda item: str(item[1][1].file))
    for file, group in groupby(ordered, key=lambda item: item[1][1].file):
        with safe_open(str(file), framework="pt") as weights:
            for canonical_name, (source_name, _) in group:
                yield canonical_name, weights.get_tensor(source_name)


def load_draft(folder: str | Path, dtype: torch.dtype | None = None) -> Draft:
    """Load a head of any checkpoint format and kind as a draft in PyTorch.

    Args:
        dtype: of its weights; None: float32.

    Raises:
        ViSpecError: see `inspect_head`.
    """
    from vllm_vispec.reference import draft_class

    info = inspect_head(folder)
    draft = draft_class(info.config)(info.config)
    draft.load_state_dict(dict(iter_canonical_tensors(info)))
    return draft if dtype is None else draft.to(dtype)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ViSpecError: the file is missing, unreadable or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ViSpecError(
            f"{path.name} is missing in {path.parent}: give the folder of a head or of a model"
        ) from error
    except (OSError, ValueError) as error:
        raise ViSpecError(
            f"{path} cannot be read as JSON ({error}): download or export the head again"
        ) from error
    if not isinstance(content, dict):
        raise ViSpecError(f"{path} holds no JSON object: download or export the head again")
    return content


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, by its index if there is one.

    Raises:
        ViSpecError: there are none, only pickles, or the index names files that are missing.
    """
    if (folder / _INDEX).is_file():
        return _indexed_files(folder / _INDEX)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    found = sorted(one for one in folder.glob("*.safetensors") if one.name != DRAFT_VOCAB)
    if found:
        return found
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise ViSpecError(
            f"{folder} holds only pickle weights ({short_list(pickles)}), which can run code and "
            "are never loaded: convert them to safetensors where you trust them"
        )
    raise ViSpecError(
        f"no *.safetensors in {folder}: download the head again, and if its author ships only "
        "pickles (*.bin, *.pt), convert them to safetensors"
    )


def _indexed_files(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ViSpecError(f"{index} has no weight_map: download or export the head again")
    names = sorted({str(name) for name in weight_map.values()})
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ViSpecError(
            f"{index.parent} lacks {short_list(missing)}, which {index.name} names: download the "
            "head again"
        )
    return [index.parent / name for name in names]


def tensor_names(folder: Path) -> list[str]:
    """Return the names of all tensors of a folder, of whatever dtype.

    Raises:
        ViSpecError: see `weight_files`; or a file is truncated or corrupt.
    """
    names: list[str] = []
    for file in weight_files(folder):
        try:
            with safe_open(str(file), framework="numpy") as weights:
                names += weights.keys()
        except (SafetensorError, OSError) as error:
            raise _corrupt(file, error) from error
    return names


def read_entries(files: list[Path]) -> dict[str, TensorEntry]:
    """Return name -> entry of every tensor in the files, from their headers.

    Raises:
        ViSpecError: a file is truncated or corrupt, a name occurs twice, or a dtype is no float.
    """
    entries: dict[str, TensorEntry] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="numpy") as weights:
                slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
                found = {name: (one.get_shape(), one.get_dtype()) for name, one in slices.items()}
        except (SafetensorError, OSError) as error:
            raise _corrupt(file, error) from error
        for name, (shape, dtype) in found.items():
            if name in entries:
                raise ViSpecError(
                    f"tensor {name!r} is in both {entries[name].file.name} and {file.name}: "
                    "keep one set of weights in the head's folder"
                )
            if dtype not in DTYPES:
                raise ViSpecError(
                    f"tensor {name!r} of the head has dtype {dtype}: only unquantised heads "
                    "(float32, float16, bfloat16) are supported"
                )
            entries[name] = TensorEntry(file, tuple(shape), str(dtype))
    return entries


def _corrupt(file: Path, error: Exception) -> ViSpecError:
    return ViSpecError(
        f"{file} is truncated or corrupt ({error}): download or export the head again"
    )


def short_list(names: list[str], limit: int = 6) -> str:
    """At most `limit` names, then a count."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _refuse_more_layers(shapes: Mapping[str, tuple[int, ...]]) -> None:
    layers = sorted({name.split(".")[1] for name in shapes if name.startswith("layers.")})
    if len(layers) > 1:
        raise ViSpecError(
            f"the head has {len(layers)} decoder layers (layers.{', layers.'.join(layers)}): only "
            "heads with one are supported, train or export one with a single layer"
        )


def _match_tensors(
    found: CheckpointFormat, head: HeadConfig, entries: Mapping[str, TensorEntry]
) -> dict[str, tuple[str, TensorEntry]]:
    """Rename the tensors; refuse what is missing, left over or of another shape."""
    from vllm_vispec.reference import tensor_shapes

    expected = tensor_shapes(head)
    sources: dict[str, tuple[str, TensorEntry]] = {}
    extra: list[str] = []
    for name, entry in entries.items():
        canonical = found.canonical_name(name)
        if canonical in expected:
            sources[canonical] = (name, entry)
        elif canonical not in found.switched_off and not found.is_ignored(name):
            extra.append(name)
    missing = [found.source_name(name) for name in expected if name not in sources]
    if missing:
        raise ViSpecError(
            f"the head ({found.name} format) lacks {len(missing)} tensor(s): "
            f"{short_list(missing)}: download or export it again, or correct the compressor and "
            "the bias and norm flags in its config.json"
        )
    if extra:
        raise ViSpecError(
            f"the head ({found.name} format) has {len(extra)} tensor(s) that its config.json "
            f"does not account for: {short_list(sorted(extra))}: correct the compressor and the "
            "bias and norm flags there, or remove them"
        )
    for name, shape in expected.items():
        source_name, entry = sources[name]
        if entry.shape != shape:
            raise ViSpecError(
                f"tensor {source_name!r} of the head ({found.name} format) has shape "
                f"{list(entry.shape)}, config.json asks for {list(shape)}: use the config.json "
                "that belongs to these weights"
            )
    return {name: sources[name] for name in expected}
