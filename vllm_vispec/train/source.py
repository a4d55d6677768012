"""What the two teacher modes share: facts of the target, its identity, records of samples.

Tensor names end in their shape: V vocabulary, D hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vllm_vispec.data.encode import Encoded
from vllm_vispec.data.types import Rejected
from vllm_vispec.train.batch import Observed
from vllm_vispec.train.chunks import Record
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.data import Corpus
from vllm_vispec.train.distributed import Processes
from vllm_vispec.train.target import TrainingTarget
from vllm_vispec.utils.errors import ViSpecError

# Weight files are known by their size and this many blocks of this size, spread evenly.
_BLOCKS, _BLOCK_BYTES = 64, 2**16


@dataclass(frozen=True)
class Facts:
    """What training needs to know of the target beside its states.

    Attributes:
        text_config: transformers config of its language model.
        embed_VD, lm_head_VD: its tables, on the run's device, in its dtype.
    """

    model_type: str
    text_config: Any
    embed_VD: Tensor
    lm_head_VD: Tensor

    @classmethod
    def of(cls, target: TrainingTarget) -> Facts:
        """Facts of a loaded target."""
        return cls(
            target.model_type,
            target.text_config,
            target.embed_VD.detach(),
            target.lm_head_VD.detach(),
        )


class Teacher(Protocol):
    """A source of observed samples."""

    @property
    def facts(self) -> Facts:
        """What training needs to know of the target."""

    @property
    def lengths(self) -> Mapping[int, int]:
        """Tokens of every usable sample, by its index in the corpus."""

    @property
    def rejected(self) -> Sequence[Rejected]:
        """Samples that cannot be encoded."""

    def observe(self, indices: Sequence[int]) -> list[Observed]:
        """What the target computes for these samples, on the run's device."""
        ...


def load_target(config: TrainConfig, group: Processes) -> TrainingTarget:
    """The target of a recipe on this process's device."""
    return TrainingTarget.load(config.target.model, target_dtype(config, group), str(group.device))


def target_dtype(config: TrainConfig, group: Processes) -> torch.dtype:
    """How the target computes: target.dtype, or by the device."""
    name = config.target.dtype
    if name == "auto":
        name = "bfloat16" if group.device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def source_key(config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
    """What lengths and states of samples depend on."""
    return {
        "format": 1,
        "data": corpus.digest,
        "target": target_id(config.target.model),
        "max_length": config.data.max_length,
    }


def target_id(model: str) -> str:
    """A name for a target's exact content: a digest of a local folder, else the hub id."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    total = hashlib.sha256()
    patterns = ("*.json", "*.jinja", "*.safetensors")
    for file in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        size = file.stat().st_size
        total.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as source:
            for block in range(_BLOCKS):
                source.seek(size * block // _BLOCKS)
                total.update(source.read(_BLOCK_BYTES))
    return total.hexdigest()


def record_of(index: int, item: Encoded | Rejected) -> Record:
    """A sample as plain data: its length, or why it is left out."""
    if isinstance(item, Rejected):
        return {"index": index, "id": item.sample_id, "rejected": item.reason}
    return {"index": index, "id": item.sample_id, "length": len(item.token_ids)}


def split_records(records: Iterable[Record]) -> tuple[dict[int, int], tuple[Rejected, ...]]:
    """Lengths by index, and the rejected samples."""
    lengths: dict[int, int] = {}
    rejected: list[Rejected] = []
    for record in records:
        if "rejected" in record:
            rejected.append(Rejected(record["id"], record["rejected"]))
        else:
            lengths[record["index"]] = record["length"]
    return lengths, tuple(rejected)


def require_usable(lengths: Mapping[int, int], rejected: Sequence[Rejected]) -> None:
    """Refuse data of which nothing is left.

    Raises:
        ViSpecError: every sample was rejected.
    """
    if lengths:
        return
    first = f" (first: {rejected[0].sample_id}: {rejected[0].reason})" if rejected else ""
    raise ViSpecError(
        f"data.train has no usable sample, {len(rejected)} were rejected{first}: correct the "
        "files, data.image_root or data.max_length"
    )
