"""Where a run's samples get the target's states from: the target itself, or a cache on disk.

Both teachers first look at every sample once. That work is cut into chunks which any process does
and which are kept on disk, so a killed job goes on with the chunks that are missing. A folder of
chunks holds index.json (what the results belong to) and one chunk-NNNNN.json per finished chunk, a
list with one record per sample. The cache of the offline teacher holds besides:

* shard-NNNNN.safetensors: per sample i its `i.token_ids` int32 [L], `i.answer` bool [L],
  `i.hidden` [L, D], and of the input embeddings only the rows that are not simply the token's
  row of the embedding table (images): `i.rows` int32 [N] and `i.embeds` [N, D];
* tables.safetensors: `embed_tokens` [V, D] and `lm_head` [V, D];
* target/config.json: the target's configuration.

Floats are in the dtype in which the target computed them, so offline equals online.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vllm_vispec.data.encode import Encoded
from vllm_vispec.data.template import load_processor
from vllm_vispec.data.types import Rejected
from vllm_vispec.heads.target import load_target_config
from vllm_vispec.train.config import TrainConfig
from vllm_vispec.train.data import Corpus, EncodedSamples
from vllm_vispec.train.distributed import Processes
from vllm_vispec.train.target import Observed, TargetFacts, TrainingTarget, target_id
from vllm_vispec.utils.errors import ViSpecError
from vllm_vispec.utils.files import read_json, read_tensors, write_json, write_tensors

SCAN_SAMPLES = 256
Usable = Mapping[int, Encoded]
"""Samples by their index in the corpus."""


class Teacher(ABC):
    """A source of observed samples.

    Attributes:
        facts: what training needs to know of the target.
        lengths: tokens of every usable sample, by its index in the corpus.
        rejected: samples that cannot be encoded.

    Args:
        folder: where chunks are kept.
        size: samples per chunk.
        key: plain data that the chunks depend on, besides data and target.

    Raises:
        ViSpecError: target, processor or data cannot be used, no sample is usable, or the folder
            holds the results of something else or cannot be written.
    """

    facts: TargetFacts

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        group: Processes,
        folder: Path,
        size: int,
        **key: str,
    ) -> None:
        self._config, self._corpus, self._group = config, corpus, group
        self._folder, self._size = folder, size
        records = self._finish_chunks(key)
        self._records = {record["index"]: record for record in records}
        self.lengths = {one["index"]: one["length"] for one in records if "length" in one}
        self.rejected = tuple(
            Rejected(one["id"], one["rejected"]) for one in records if "rejected" in one
        )
        if not self.lengths:
            first = "".join(f" (first: {x.sample_id}: {x.reason})" for x in self.rejected[:1])
            raise ViSpecError(
                f"data.train has no usable sample, {len(self.rejected)} were rejected{first}: "
                "correct the files, data.image_root or data.max_length"
            )

    @abstractmethod
    def observe(self, indices: Sequence[int]) -> list[Observed]:
        """Return what the target computes for these samples, on the run's device."""

    def _keep(self, number: int, usable: Usable) -> None:  # noqa: B027
        """Keep what a chunk's samples need besides their records."""

    @cached_property
    def _samples(self) -> EncodedSamples:
        processor = load_processor(self._config.target.model)
        return EncodedSamples(self._corpus, processor, self._config.data)

    @cached_property
    def _target(self) -> TrainingTarget:
        """Loaded on first use: a finished cache needs none."""
        dtype = _target_dtype(self._config, self._group)
        return TrainingTarget.load(self._config.target.model, dtype, str(self._group.device))

    def _finish_chunks(self, key: Mapping[str, str]) -> list[dict[str, Any]]:
        """Do the chunks that are missing; return the records of all samples, in order."""
        count, size, group = len(self._corpus.entries), self._size, self._group
        chunks = [range(first, min(first + size, count)) for first in range(0, count, size)]
        files = [self._folder / f"chunk-{number:05d}.json" for number in range(len(chunks))]
        if group.is_main:
            self._claim({**key, "samples": count, "chunk_samples": size})
        group.wait()
        for number in range(group.rank, len(chunks), group.world):
            if not files[number].is_file():
                items = {index: self._samples(index) for index in chunks[number]}
                self._keep(number, {i: x for i, x in items.items() if isinstance(x, Encoded)})
                write_json(files[number], [_record(*item) for item in items.items()])
        group.wait()
        return [record for file in files for record in read_json(file)]

    def _claim(self, key: Mapping[str, Any]) -> None:
        """Write what the folder's results belong to, or compare."""
        wanted = {
            "format": 1,
            "data": self._corpus.digest,
            "target": target_id(self._config.target.model),
            "max_length": self._config.data.max_length,
            **key,
        }
        index = self._folder / "index.json"
        if not index.is_file():
            write_json(index, wanted)
            return
        found = read_json(index)
        names = {*found, *wanted}
        differing = sorted(name for name in names if found.get(name) != wanted.get(name))
        if differing:
            raise ViSpecError(
                f"{self._folder} holds the results of another run ({', '.join(differing)} differ): "
                "choose another teacher.cache_dir or run.output, or delete it"
            )


class OnlineTeacher(Teacher):
    """The target runs in every step; only the samples' lengths are kept on disk."""

    def __init__(self, config: TrainConfig, corpus: Corpus, group: Processes) -> None:
        load_target_config(config.target.model)
        super().__init__(config, corpus, group, Path(config.run.output) / "lengths", SCAN_SAMPLES)
        self.facts = self._target

    def observe(self, indices: Sequence[int]) -> list[Observed]:
        """Run the target on these samples, as one batch."""
        return self._target.observe([self._samples.require(index) for index in indices])


class OfflineTeacher(Teacher):
    """Reads the target's states from the cache, which it completes first."""

    def __init__(self, config: TrainConfig, corpus: Corpus, group: Processes) -> None:
        folder, size = cache_folder(config), config.teacher.shard_samples
        super().__init__(
            config, corpus, group, folder, size, dtype=str(_target_dtype(config, group))
        )
        tables = folder / "tables.safetensors"
        if group.is_main and not tables.is_file():
            self._target.model.config.save_pretrained(folder / "target")
            lm_head_VD = self._target.lm_head_VD.clone()  # perhaps the same tensor
            write_tensors(tables, {"embed_tokens": self._target.embed_VD, "lm_head": lm_head_VD})
        group.wait()
        # Perhaps loaded for the cache. Training needs neither, and both are large.
        for name in ("_target", "_samples"):
            vars(self).pop(name, None)
        target_config = load_target_config(folder / "target")
        found = {name: one.to(group.device) for name, one in read_tensors(tables).items()}
        self.facts = TargetFacts(
            target_config.model_type,
            target_config.get_text_config(),
            found["embed_tokens"],
            found["lm_head"],
        )

    def observe(self, indices: Sequence[int]) -> list[Observed]:
        """Read these samples, in the order asked for."""
        found: dict[int, Observed] = {}
        for shard, members in groupby(sorted(set(indices)), key=lambda index: index // self._size):
            with safe_open(str(self._shard(shard)), framework="pt") as file:
                found.update({index: self._read(file, index) for index in members})
        return [found[index] for index in indices]

    def _shard(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.safetensors"

    def _read(self, file: Any, index: int) -> Observed:
        def tensor(name: str) -> Tensor:
            return file.get_tensor(f"{index}.{name}").to(self._group.device)

        record, token_ids = self._records[index], tensor("token_ids").long()
        embeds_LD = self.facts.embed_VD[token_ids]
        embeds_LD[tensor("rows").long()] = tensor("embeds")
        return Observed(
            sample_id=record["id"],
            family=record["family"],
            token_ids=token_ids,
            answer=tensor("answer"),
            runs=tuple((start, end) for start, end in record["runs"]),
            embeds_LD=embeds_LD,
            hidden_LD=tensor("hidden"),
        )

    def _keep(self, number: int, usable: Usable) -> None:
        """Write a shard: what the target computes for the samples of a chunk."""
        tensors: dict[str, Tensor] = {}
        # Like lengths together, against padding.
        order = sorted(usable, key=lambda index: len(usable[index].token_ids))
        size = self._config.batch.size
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            observed = self._target.observe([usable[index] for index in batch])
            for index, one in zip(batch, observed, strict=True):
                tensors |= self._pack(index, one)
        if tensors:
            write_tensors(self._shard(number), tensors)

    def _pack(self, index: int, observed: Observed) -> dict[str, Tensor]:
        table_LD = self._target.embed_VD[observed.token_ids]
        rows_N = (observed.embeds_LD != table_LD).any(dim=1).nonzero()[:, 0]
        return {
            f"{index}.token_ids": observed.token_ids.to(torch.int32),
            f"{index}.answer": observed.answer,
            f"{index}.hidden": observed.hidden_LD.clone(),
            f"{index}.rows": rows_N.to(torch.int32),
            f"{index}.embeds": observed.embeds_LD[rows_N],
        }


def open_teacher(config: TrainConfig, corpus: Corpus, group: Processes) -> Teacher:
    """Return the teacher that `teacher.mode` names."""
    chosen = OnlineTeacher if config.teacher.mode == "online" else OfflineTeacher
    return chosen(config, corpus, group)


def cache_folder(config: TrainConfig) -> Path:
    """Return where a recipe's cache is."""
    return Path(config.teacher.cache_dir or Path(config.run.output) / "cache")


def _target_dtype(config: TrainConfig, group: Processes) -> torch.dtype:
    name = config.target.dtype
    if name == "auto":
        name = "bfloat16" if group.device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _record(index: int, item: Encoded | Rejected) -> dict[str, Any]:
    """A sample as plain data, or why it is left out."""
    found = {"index": index, "id": item.sample_id}
    if isinstance(item, Rejected):
        return found | {"rejected": item.reason}
    runs = [list(run) for run in item.runs]
    return found | {"length": len(item.token_ids), "family": item.family, "runs": runs}
